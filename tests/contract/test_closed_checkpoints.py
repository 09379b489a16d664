"""Nothing of a checkpoint's files is run, whichever of them was made to."""

import io
import os
import pickle
from pathlib import Path

import megatron_cases as cases
import pytest

FILES = ["common.pt", ".metadata", "object", "outside"]


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def save(rank, folder):
    module = cases.build_module(rank, "trainer", {})
    data, _ = cases.lane_batches(module, cases.make_rows(7), cases.SFT)
    module.train_step(data)
    module.checkpoint_dir = Path(folder)
    module.save_checkpoint(1)


def spoil(folder, file, attack):
    """Put the attack where `file` says."""
    import torch

    if file == "common.pt":
        torch.save({"iteration": attack}, folder / file)
        return
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(attack))
        return
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    [place] = [p for i, p in metadata.storage_data.items() if "_extra_state" in i.fqn][:1]
    if file == "outside":
        place.relative_path = "../common.pt"
    else:
        blob = io.BytesIO()
        torch.save([attack], blob)
        with (folder / place.relative_path).open("ab") as data:
            place.offset, place.length = data.tell(), len(blob.getvalue())
            data.write(blob.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def load(rank, folder, way):
    """What our loading says of it; Megatron's own, by its name."""
    from megatron.core import dist_checkpointing

    from chatlearn.errors import CheckpointError
    from megatron_adapters import checkpointing

    module = cases.build_module(rank, "trainer", {}, seed=11)
    # A user's wish for the old way must not open the door again.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        if way == "theirs":
            dist_checkpointing.load(checkpointing._weights(module.model), folder)
        elif way == "weights":
            module.load_checkpoint(folder)
        else:
            module.resume_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
    return ""


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(1, save, str(folder))
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("way", ["go on", "weights"])
@pytest.mark.parametrize("file", FILES)
def test_code_in_a_file_is_not_run(ranks, copied, tmp_path, file, way):
    owned = tmp_path / "owned"
    spoil(copied, file, Attack(owned))
    [said] = ranks.run(1, load, str(copied), way)
    assert not owned.exists()
    assert "\n" not in said
    reasons = {
        ".metadata": "names posix.mkdir, which is no record of a checkpoint",
        "outside": "names '../common.pt', a file outside",
    }
    plain = "more than tensors and plain values (it names posix.mkdir): do not trust it"
    assert reasons.get(file, plain) in said


@pytest.mark.parametrize("file", ["common.pt", "object"])
def test_megatrons_own_loading_would_run_it(ranks, copied, tmp_path, file):
    """Why there is a reader of our own; where this fails, it may go."""
    spoil(copied, file, Attack(tmp_path / "owned"))
    ranks.run(1, load, str(copied), "theirs")
    assert (tmp_path / "owned").is_dir()

"""What a storage is known by, and what ranks on GPUs speak over."""

import pytest
import torch

from chatlearn.sync import shared_memory
from chatlearn.sync.channel import choose_backend
from chatlearn.sync.shared_memory import CounterFiles, StorageHandles, TensorHandle

NUM_BYTES = 1 << 16


def make_numbered():
    """A way to make handles that are all different."""
    made = []

    def make(storage):
        made.append(storage.nbytes())
        return (len(made),)

    return make


def test_a_storage_has_one_handle_as_long_as_it_lives():
    tensor, make = torch.zeros(NUM_BYTES, dtype=torch.uint8), make_numbered()
    handles = StorageHandles()
    assert handles.find(tensor.untyped_storage(), make) == (1,)
    assert handles.find(tensor[5:].detach().untyped_storage(), make) == (1,)
    assert handles.find(torch.zeros(NUM_BYTES).untyped_storage(), make) == (2,)
    handles.retain(())
    assert handles.find(tensor.untyped_storage(), make) == (3,)


def test_a_storage_that_lies_where_another_one_was_has_a_handle_of_its_own():
    make, handles = make_numbered(), StorageHandles()
    seen = {}
    for number in range(1, 50):
        # So large that the kernel gives the address, which then is free again; nothing is written.
        storage = torch.empty(1 << 26, dtype=torch.uint8).untyped_storage()
        place = storage.data_ptr()
        assert handles.find(storage, make) == (number,)
        del storage
        if place in seen:
            break
        seen[place] = number
    else:
        pytest.skip("no address was used twice")


@pytest.mark.parametrize(
    ("device_ids", "backend"),
    [
        (["a", "b"], "nccl"),
        (["a", "b", "a"], "gloo"),
        (["a", ""], "gloo"),
        (["", ""], "gloo"),
    ],
)
def test_nccl_serves_ranks_that_have_a_gpu_each(device_ids, backend):
    assert choose_backend(device_ids) == backend


def test_files_of_counters_go_with_the_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    names = ("torch_1_2_0", "torch_1_2_1", "of_somebody_else")
    for name in names:
        (tmp_path / name).touch()
    handles = {
        f"weight{at}": TensorHandle(
            ("cuda", 0, b"handle", 64, 0, f"/{name}".encode(), at, b"event", True),
            "float32",
            0,
            (4,),
            (1,),
        )
        for at, name in enumerate((names[0], names[0], names[1]))
    }
    on_cpu = TensorHandle(("cpu", 1, 2, 3, 4), "float32", 0, (4,), (1,))
    files = CounterFiles()
    files.add({**handles, "other": on_cpu})
    (tmp_path / names[1]).unlink()
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["of_somebody_else"]

# pyright: standard, reportPrivateImportUsage=false
"""Damaged checkpoint files of every kind, and what loads them."""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.fuzzing.damage import damage_file

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

__all__ = ["HuggingFaceMaker", "MegatronMaker", "RunFolderMaker", "TorchFileMaker"]

_SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_sequence_length": 16,
    "bf16": False,
}


@dataclass(frozen=True)
class _Load:
    """Something is loaded from a folder that was damaged."""

    description: str
    action: Callable[[], object]
    must_refuse: bool = False

    def load(self) -> None:
        """As a run does."""
        self.action()


class _FolderMaker:
    """Damages one file, seldom two, of a copy of a good folder.

    Args:
        folder: to work in; the good folder is made below it.
    """

    def __init__(self, folder: Path) -> None:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        self._good = folder / "good"
        self._bad = folder / "bad"
        self._marker = folder / "owned"

    def damage(self, lots: random.Random) -> str:
        """A fresh copy, damaged; says how."""
        shutil.rmtree(self._bad, ignore_errors=True)
        shutil.copytree(self._good, self._bad)
        notes: list[str] = []
        for _ in range(lots.choice((1, 1, 1, 2))):
            files = sorted(path for path in self._bad.rglob("*") if path.is_file())
            others = sorted(path for path in self._good.rglob("*") if path.is_file())
            if files:
                file = lots.choice(files)
                how = damage_file(file, others, self._marker, lots)
                notes.append(f"{file.relative_to(self._bad)}: {how}")
        return "; ".join(notes)

    def is_changed(self) -> bool:
        """Whether any file of the good folder is missing or another one in the copy."""
        files = [path for path in self._good.rglob("*") if path.is_file()]
        copies = [self._bad / path.relative_to(self._good) for path in files]
        return any(
            not copy.is_file() or copy.read_bytes() != path.read_bytes()
            for path, copy in zip(files, copies, strict=True)
        )


class TorchFileMaker(_FolderMaker):
    """`model.pt` of a plain torch model and optimizer, and a file of plain values."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import torch

        from chatlearn.checkpoint.generators import read_generators
        from chatlearn.checkpoint.plain_values import save_plain
        from chatlearn.models.plain_weights import read_state, write_state

        self._model = torch.nn.Linear(4, 3)
        self._optimizer = torch.optim.Adam(self._model.parameters())
        self._model(torch.ones(4)).sum().backward()
        self._optimizer.step()
        write_state(self._good / "model.pt", read_state(self._model, self._optimizer, 1))
        save_plain(self._good / "values.pt", read_generators(), "values")

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        how = self.damage(lots)
        return _Load(how, self._load)

    def _load(self) -> None:
        import torch

        from chatlearn.checkpoint.generators import restore_generators
        from chatlearn.checkpoint.plain_values import load_plain
        from chatlearn.models.plain_weights import load_state

        # A fresh one: what a damaged state leaves in an optimizer is not the next case's.
        optimizer = torch.optim.Adam(self._model.parameters())
        load_state(self._bad / "model.pt", self._model, optimizer, torch.device("cpu"))
        restore_generators(load_plain(self._bad / "values.pt"))


class MegatronMaker(_FolderMaker):
    """A distributed checkpoint, loaded to go on, for its weights, and to be converted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._module = _build_trainer()
        self._module.checkpoint_dir = self._good
        self._module.save_checkpoint(1)

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        how = self.damage(lots)
        ways = {"go on": self._go_on, "weights": self._load_weights, "convert": self._convert}
        way = lots.choice(sorted(ways))
        return _Load(f"{way}: {how}", ways[way])

    def _go_on(self) -> None:
        from chatlearn.errors import ChatLearnError
        from megatron_adapters.checkpointing import load_training

        try:
            load_training(str(self._good), self._module.training)
        except ChatLearnError:
            # A damaged state was accepted before and has left its mark.
            self._module = _build_trainer(is_trained=False)
            load_training(str(self._good), self._module.training)
        load_training(str(self._bad), self._module.training)

    def _load_weights(self) -> None:
        self._module.load_checkpoint(str(self._bad))

    def _convert(self) -> None:
        _read_all(self._bad)


class HuggingFaceMaker(_FolderMaker):
    """Hugging Face folders, as a run starts from them, and to be converted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from megatron_adapters.conversion.convert import ConversionOptions, convert

        source = folder / "source"
        module = _build_trainer()
        module.checkpoint_dir = source
        module.save_checkpoint(1)
        for max_file_bytes, name in ((1 << 30, "one"), (6_000, "several")):
            options = ConversionOptions("hf", family="llama2", max_file_bytes=max_file_bytes)
            convert(source, self._good / name, options)

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        how = self.damage(lots)
        return _Load(how, self._load)

    def _load(self) -> None:
        from chatlearn.config import load_config
        from megatron_adapters import PolicyInference

        for folder in sorted(self._good.iterdir()):
            bad = self._bad / folder.name
            config = load_config({"models": {"m": {"pretrained": str(bad)}}})
            PolicyInference("m").complete_config(config.model("m"))
            _read_all(bad)


class RunFolderMaker(_FolderMaker):
    """A whole checkpoint of a run, whose manifest must show every change."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from chatlearn.checkpoint.folders import begin_checkpoint
        from chatlearn.checkpoint.run_state import RunState

        draft = begin_checkpoint(folder, 3)
        trainer = _build_trainer()
        trainer.checkpoint_dir = draft.model_folder("trainer")
        trainer.save_checkpoint(1)
        (draft.folder / "config.yaml").write_text("runtime: {}\n", encoding="utf-8")
        (draft.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n', encoding="utf-8")
        state = RunState(3, 6, 24, (24,), 0, (40,), trained=("trainer",), created_s=1.0)
        self._checkpoint = draft.commit(state)
        self._checkpoint.rename(self._good)

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        way = lots.choice(("verify", "verify", "state", "history"))
        if way == "verify":
            how = self.damage(lots)
            return _Load(f"verify: {how}", self._verify, must_refuse=self.is_changed())
        shutil.rmtree(self._bad, ignore_errors=True)
        shutil.copytree(self._good, self._bad)
        name = "run_state.json" if way == "state" else "metrics.jsonl"
        how = damage_file(self._bad / name, [self._good / "config.yaml"], self._marker, lots)
        return _Load(f"{way}: {how}", self._read_state if way == "state" else self._read_history)

    def _verify(self) -> None:
        from chatlearn.checkpoint.manifest import verify_checkpoint

        verify_checkpoint(self._bad)

    def _read_state(self) -> None:
        from chatlearn.checkpoint.run_state import read_run_state

        read_run_state(self._bad)

    def _read_history(self) -> None:
        from chatlearn.engine.resume import read_history

        read_history(self._bad)


def _read_all(folder: Path) -> None:
    """Every tensor, as the conversion reads them."""
    from megatron_adapters.conversion.sources import describe_parts, make_tensors, open_source

    source = open_source(folder)
    for shards in describe_parts(source.model):
        source.read(shards, make_tensors(shards))


def _build_trainer(*, is_trained: bool = True) -> Any:
    """A tiny trainer in a world of this process alone; trained: after a step."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_adapters import PolicyTrainer
    from megatron_adapters.conversion.worlds import build_module
    from megatron_adapters.patches.apply import import_megatron

    import_megatron()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    module = build_module(PolicyTrainer, "trainer", _SHAPE)
    if is_trained:
        rows = {"prompt_token_ids": [3, 4, 5], "response_token_ids": [6, 7, 8, 9]}
        module.train_step([{key: [torch.tensor(ids)] for key, ids in rows.items()}])
    return module

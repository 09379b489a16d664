"""What the engine adds to its workers' time: stages that only wait, in both backends.

Each of an episode's stages sleeps, so that other programs on the machine do not count.
`python -m scripts.bench.engine_overhead --rows 64 --stage-s 0.3`
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


class Sleeper(BaseModule):
    """Takes `args["stage_s"]` seconds for a call, and gives rows like those of a rollout."""

    def setup(self) -> None:
        """A few weights, so that there is something to sync."""
        self.model = torch.nn.Linear(64, 64)

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Rows of prompts and responses."""
        time.sleep(self.args["stage_s"])
        length = self.args["length"]
        rows = len(next(iter(data.values())))
        prompts = [torch.zeros(length, dtype=torch.int64)] * rows
        responses = [torch.zeros(length, dtype=torch.int64)] * rows
        logprobs = [torch.zeros(length)] * rows
        return {
            "prompt_token_ids": prompts,
            "response_token_ids": responses,
            f"{self.name}_logprobs": logprobs,
        }

    def train_step(self, data: list[dict[str, Any]]) -> dict[str, float]:
        """Nothing is learned."""
        del data
        time.sleep(self.args["stage_s"])
        return {"loss": 0.0}


def measure(backend: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Metrics of every episode of one run."""
    args = {"stage_s": options.stage_s, "length": options.length}
    policy, reference, trainer = (
        Sleeper(name, args) for name in ("policy", "reference", "trainer")
    )
    engine = Engine(
        Environment(lambda batch: reference.forward_step(policy.forward_step(batch))),
        Trainer(lambda batch: trainer.train_step(batch)),
    )
    engine.set_parameter_sync(trainer, policy).set_dataset(list(range(options.rows)))
    with tempfile.TemporaryDirectory() as folder:
        runtime = {
            "backend": backend,
            "num_episode": options.episodes,
            "sample_per_episode": options.rows,
            "generation_batch_size": options.rows // options.calls,
            "train_global_batch_size": options.rows // options.calls,
            "output_dir": folder,
        }
        chatlearn.init({"runtime": runtime})
        return engine.learn().metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each episode's overhead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calls", type=int, default=4, help="calls of each stage")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--stage-s", type=float, default=0.3)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--backends", nargs="*", default=["local", "ray"])
    parser.add_argument("--profile", action="store_true", help="show where the driver is")
    options = parser.parse_args(arguments)
    for backend in options.backends:
        profiler = cProfile.Profile()
        if options.profile:
            profiler.enable()
        found = measure(backend, options)
        profiler.disable()
        for entry in found:
            busy_s = entry["time/critical_path"]
            print(
                f"{backend:6s} episode {entry['step']:.0f}: critical path {busy_s:.3f} s, overhead "
                f"{100 * entry['engine_overhead']:.2f} %, sync {entry['sync/policy/seconds']:.4f} s"
            )
        if options.profile:
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`chatlearn`: parse the arguments, run the command, turn errors into exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ChatLearnError, ConfigError, FlowError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main", "run_to_exit_code"]

EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 success, 1 a failed run, 2 a bad config or bad arguments, 130 Ctrl-C,
        143 SIGTERM (after a checkpoint was saved).
    """
    if not sys.platform.startswith("linux"):
        _say(f"chatlearn runs on Linux only (got {sys.platform}): use a container or WSL 2.")
        return EXIT_BAD_CONFIG
    parsed = _parse_arguments(arguments)
    if os.getcwd() not in sys.path:
        # As with `python -m`: modules that a config names are found from the current folder.
        sys.path.insert(0, os.getcwd())
    return run_to_exit_code(lambda: _run_command(parsed))


def run_to_exit_code(action: Callable[[], object]) -> int:
    """Do something and turn how it ends into a message and an exit code.

    Args:
        action: what to do; its result is dropped.

    Returns:
        See `main`.
    """
    from chatlearn.engine.run import Terminated

    try:
        action()
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Terminated as stop:
        _say(str(stop))
        return EXIT_TERMINATED
    except (ConfigError, FlowError) as error:
        _say(f"error: {error}")
        return EXIT_BAD_CONFIG
    except ChatLearnError as error:
        _say(f"error: {error}")
        return EXIT_FAILED
    return 0


def _run_command(parsed: argparse.Namespace) -> None:
    # Commands import torch and ray; --help and --version do not wait for them.
    from chatlearn.cli.commands import run_check, run_eval, run_plan, run_train
    from chatlearn.cli.convert import run_convert
    from chatlearn.cli.replay import run_replay

    commands = {
        "train": run_train,
        "eval": run_eval,
        "check": run_check,
        "plan": run_plan,
        "convert": run_convert,
        "replay": run_replay,
    }
    commands[parsed.command](parsed)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _build_parser()
    parsed, left = parser.parse_known_args(arguments)
    # argparse takes no more of a list once an option stood between its entries.
    stray = [entry for entry in left if entry.startswith("-") or "=" not in entry]
    stray += left if parsed.command == "convert" else []
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    parsed.overrides += left
    return parsed


def _build_parser() -> argparse.ArgumentParser:
    from chatlearn import __version__

    parser = argparse.ArgumentParser(
        prog="chatlearn", description="Reinforcement learning on Megatron-Core models."
    )
    parser.add_argument("--version", action="version", version=f"chatlearn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "train": "run the engine that the config names",
        "eval": "evaluate once, without training",
        "check": "validate and print graph, placement and weight sync; starts nothing",
        "plan": "print each weight sync's plan and what it takes; starts nothing",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="the YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="key.path=value", help="win over the file"
        )
        if name in ("check", "plan"):
            command.add_argument(
                "--assume-devices",
                type=int,
                metavar="N",
                help="plan for N GPUs instead of those that are there",
            )
        if name == "plan":
            _add_cluster_arguments(command)
    _add_convert_arguments(commands)
    text = "run a training step again whose numbers went wrong"
    command = commands.add_parser("replay", help=text, description=text)
    command.add_argument("dump", help="its folder, below `dumps` of a run")
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="win over its config"
    )
    return parser


def _add_convert_arguments(commands: Any) -> None:
    text = "turn a model of one format into another"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument(
        "source", nargs="?", help="Hugging Face folder, or a model's folder in a checkpoint"
    )
    command.add_argument("target", nargs="?", help="the folder to write")
    command.add_argument("--to", choices=("hf", "megatron", "peft"), help="the target's format")
    command.add_argument("--verify", action="store_true", help="read back and compare")
    command.add_argument("--family", help="of a Hugging Face folder, for models made from scratch")
    command.add_argument(
        "--like", metavar="DIR", help="Hugging Face folder of the same model, for its config.json"
    )
    command.add_argument("--tokenizer", metavar="PATH", help="goes along with the weights")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights")
    command.add_argument("--max-file-gb", type=float, metavar="GB", help="default: 5")
    command.add_argument(
        "--parity-table", action="store_true", help="compare every family with transformers"
    )
    command.add_argument("--families", nargs="+", metavar="NAME", help="of the table; default: all")
    command.add_argument("--json", action="store_true", help="end with one line of JSON")
    command.set_defaults(overrides=[])


def _add_cluster_arguments(command: argparse.ArgumentParser) -> None:
    usual = "default: H100 nodes with 400 Gb/s a GPU, or a host without GPUs"
    for name, unit, text in (
        ("--node-gb-s", "GB/S", f"speed of one rank within a node ({usual})"),
        ("--network-gb-s", "GB/S", "speed of one rank across nodes"),
        ("--latency-us", "US", "latency of one message"),
    ):
        command.add_argument(name, type=float, metavar=unit, help=text)
    command.add_argument("--json", action="store_true", help="end with one line of JSON")


def _say(text: str) -> None:
    from chatlearn.config.secrets import hide_secrets

    sys.stderr.write(f"{hide_secrets(text)}\n")


if __name__ == "__main__":
    sys.exit(main())

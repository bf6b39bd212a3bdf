"""The command `mmtune`. What a subcommand needs is imported only when it is called."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mmtune.core.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Exit codes: 0 done, 2 the user's mistake (one clear message), 1 a fault of ours."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        count = len(error.faults)
        print(f"mmtune: {error}" if count == 1 else f"mmtune: {count} faults\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmtune: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmtune",
        description="Assemble a vision-language model from parts, tune each part, see what was gained and forgotten.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a run and write runs/NAME")
    train.add_argument("yaml", type=Path, help="the run's YAML")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.clip=0.5")
    train.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    train.set_defaults(run=_train)

    data = commands.add_parser("data", help="prepare a dataset")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="make what cards and protocols read")
    prepare.add_argument(
        "name", choices=["tiny"], help="tiny: the world that ships with mmtune, drawn from a seed"
    )
    prepare.add_argument("--output_path", type=Path, default=Path("datasets/tiny"))
    prepare.add_argument("--seed", type=int, default=0)
    prepare.set_defaults(run=_prepare)
    return parser


def _train(options: argparse.Namespace) -> None:
    from mmtune.run import read_run

    run = read_run(options.yaml, options.overrides)
    from mmtune.training.loop import train

    folder = train(run, resume=options.resume)
    print(f"trained: {folder}")


def _prepare(options: argparse.Namespace) -> None:
    from mmtune.data.tiny import generate

    generate(options.output_path, options.seed)
    tokenizer = options.output_path / "tokenizer"
    if not tokenizer.exists():
        from mmtune.data.tiny_tokenizer import train_tokenizer

        train_tokenizer(options.output_path, tokenizer)


if __name__ == "__main__":
    sys.exit(main())

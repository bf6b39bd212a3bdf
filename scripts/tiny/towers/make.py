"""Makes one vision tower of the tiny world, in its library's own format, with a card that says its worth.

`python scripts/tiny/towers/make.py contrastive FOLDER`; the kinds are the files beside this one. With
--untrained it stays as it was drawn: the control.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from pictures import WIDTH, Pictures, probe, read_pictures

KINDS = {  # in whose format, and what it learns
    "contrastive": ("open_clip's, the visual tower alone", "which caption belongs to which picture"),
    "supervised": ("timm's", "which things and letters are in a picture, not where"),
    "self_supervised": (
        "transformers', a DINOv2",
        "to know a cell again when it is seen anew; no labels, no captions",
    ),
}
PROBED = """
The probe is a linear read-out of a cell's content from its own token: percent right on held-out pictures.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the kind's own number")
    parser.add_argument("--pictures", type=int, help="only the first so many")
    parser.add_argument("--world", type=Path, default=Path("datasets/tiny"))
    args = parser.parse_args(arguments)
    if args.folder.exists():
        print(f"{args.folder} is there already.")
        return
    kind = importlib.import_module(args.kind)
    seen, held_out = read_pictures(args.world, args.pictures)
    torch.manual_seed(args.seed)
    model = kind.new()
    before = judge(kind, model, held_out)
    print(f"{args.kind}, untrained: {said(before)}", flush=True)
    facts = [f"**Learns**: nothing; drawn from seed {args.seed}", f"**Probe**: {said(before)}"]
    if not args.untrained:
        steps, start = args.steps or kind.STEPS, time.process_time()
        loss = kind.train(model, seen, steps)
        minutes, after = (time.process_time() - start) / 60, judge(kind, model, held_out)
        print(f"{args.kind}, trained, {minutes:.1f} minutes of processor time: {said(after)}")
        facts = [
            f"**Learns**: {KINDS[args.kind][1]}",
            f"**Training**: {steps:,} steps on {len(seen):,} pictures, seed {args.seed}, "
            f"{minutes:.1f} minutes of processor time, last loss {loss:.4f}",
            f"**Probe**: {said(after)}; before training {said(before)}",
        ]
    unfinished = args.folder.with_name(args.folder.name + ".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    kind.save(model, unfinished)
    (unfinished / "README.md").write_text(card(args.folder.name, args.kind, facts))
    unfinished.rename(args.folder)


@torch.no_grad()
def judge(kind: Any, model: Any, pictures: Pictures) -> dict[str, float]:
    model.eval()
    features = torch.cat([kind.features(model, some) for some in pictures.pixels.split(250)])
    model.train()
    return probe(features, pictures.contents)


def said(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score}" for name, score in scores.items())


def card(name: str, kind: str, facts: list[str]) -> str:
    lines = [
        f"**Format**: {KINDS[kind][0]}",
        f"**Size**: {WIDTH} wide, 3 layers, 4 heads, 16 patches of 16 pixels; weights in fp16",
        *facts,
        "**Made by**: `bash scripts/tiny_towers.sh`",
        "**Licence**: Apache-2.0; so are the pictures it saw, which mmtune draws",
    ]
    return (
        f"# A vision tower of the tiny world: {name}\n\n" + "".join(f"* {line}.\n" for line in lines) + PROBED
    )


if __name__ == "__main__":
    main()

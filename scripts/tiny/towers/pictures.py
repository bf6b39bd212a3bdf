"""What a tower of the tiny world is made from and judged by: pictures, what stands in each cell, a probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmtune.data.tiny import COLOURS, LETTERS, SHAPES

SIDE, PATCH, WIDTH = 64, 16, 96  # of every tower made here
MEAN, STD = 0.5, 0.5
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
CONTENTS = ["-", *THINGS, *LETTERS]  # of a cell
HELD_OUT = 2_000  # the last pictures, which no tower is trained on


@dataclass
class Pictures:
    """uint8 pixels [N, 3, 64, 64]; contents [N, 16], indices of CONTENTS in reading order; captions."""

    pixels: torch.Tensor
    contents: torch.Tensor
    captions: list[str]

    def __getitem__(self, some: slice) -> Pictures:
        return Pictures(self.pixels[some], self.contents[some], self.captions[some])

    def __len__(self) -> int:
        return len(self.pixels)


def read_pictures(folder: Path, limit: int | None = None) -> tuple[Pictures, Pictures]:
    """The training pictures that `mmtune data prepare tiny` drew: to train on, and held out."""
    rows = json.loads((folder / "train_captions.json").read_text())[:limit]
    transcripts = json.loads((folder / "train_cells.json").read_text())[:limit]
    cells = [_answer(row).replace("\n", " | ").split(" | ") for row in transcripts]
    pixels = np.stack([np.asarray(Image.open(folder / row["image"])) for row in rows])
    pictures = Pictures(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([[CONTENTS.index(content) for content in picture] for picture in cells]),
        [_answer(row) for row in rows],
    )
    held_out = min(HELD_OUT, len(pictures) // 2)
    return pictures[:-held_out], pictures[-held_out:]


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def descend(
    loss: Callable[[torch.Tensor], torch.Tensor],
    parameters: Iterable[torch.nn.Parameter],
    count: int,
    steps: int,
    batch_size: int = 64,
    rate: float = 2e-3,
) -> float:
    """AdamW with warm-up and cosine on batches drawn from `count` pictures; `loss` takes their indices.

    Returns the mean of the last hundred losses.
    """
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    losses: list[float] = []
    for step in range(1, steps + 1):
        found = loss(torch.randint(count, (batch_size,)))
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(found.item())
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {np.mean(losses[-100:]):.4f}", flush=True)
    return float(np.mean(losses[-100:]))


def probe(features: torch.Tensor, contents: torch.Tensor, ridge: float = 1e-3) -> dict[str, float]:
    """Percent right where a linear read-out of a filled cell's own token says what stands in it.

    features: [N, 16, width]; contents: [N, 16]. The read-out is a ridge regression in closed form on three
    quarters of the pictures, judged on the rest. An empty cell is not asked about.
    """
    cut = len(features) * 3 // 4
    known, asked = contents[:cut] > 0, contents[cut:] > 0
    centre, spread = features[:cut][known].mean(0), features[:cut][known].std(0) + 1e-6
    x, new = (
        torch.nn.functional.pad((some.double() - centre) / spread, (0, 1), value=1.0)
        for some in (features[:cut][known], features[cut:][asked])
    )
    y = torch.nn.functional.one_hot(contents[:cut][known], len(CONTENTS)).double()
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    said, truth = (new @ weights).argmax(1), contents[cut:][asked]
    thing, named = truth <= len(THINGS), said <= len(THINGS)
    colour, shape = ((said - 1) // len(SHAPES), (said - 1) % len(SHAPES))
    right = {
        "colour": (named & (colour == (truth - 1) // len(SHAPES)))[thing],
        "shape": (named & (shape == (truth - 1) % len(SHAPES)))[thing],
        "letter": (said == truth)[~thing],
    }
    return {name: round(100 * hits.double().mean().item(), 1) for name, hits in right.items()}


def _answer(row: dict[str, Any]) -> str:
    return str(row["conversations"][1]["value"])

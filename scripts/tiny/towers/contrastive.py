"""A CLIP of open_clip, trained by open_clip's own loop and loss on captions that name things and places.

open_clip's `main` reads its data through pandas; the loop it calls takes any batches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip import create_loss
from open_clip.model import CLIP
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from pictures import MEAN, PATCH, SIDE, STD, WIDTH, Pictures, normalised
from safetensors.torch import save_file

from mmtune.data.tiny import COLOURS, LETTERS, SHAPES

STEPS = 2_500
BATCH = 64
RATE = 1e-3
WORDS = ["", "row", "column", "sign", *"1234", *COLOURS, *SHAPES, *LETTERS, "<start>", "<end>"]
LONGEST = 32  # five things of six words each, the start and the end
VISION = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "width": WIDTH,
    "layers": 3,
    "head_width": WIDTH // 4,
    "mlp_ratio": 2.0,
}
TEXT = {"context_length": LONGEST, "vocab_size": len(WORDS), "width": 64, "heads": 4, "layers": 2}


def new() -> Any:
    return CLIP(WIDTH, VISION, TEXT, output_dict=True)


def train(model: Any, pictures: Pictures, steps: int) -> float:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = f"--model ViT --device cpu --precision fp32 --lr {RATE} --grad-clip-norm 1"
    args = parse_args(given.split())
    args.distill = args.save_logs = args.wandb = False
    init_distributed_device(args)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (args.beta1, args.beta2), weight_decay=0.05)
    batches = Batches(pictures, steps)
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    schedule = cosine_lr(optimizer, RATE, max(1, steps // 20), steps)
    heard = Heard(create_loss(args))
    train_one_epoch(model, data, heard, 0, optimizer, None, schedule, None, args)
    return sum(heard.losses[-100:]) / len(heard.losses[-100:])


class Heard:
    """open_clip's loss, and what it was."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.losses = loss, list[float]()

    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        found = self.loss(**given)
        self.losses.append(sum(found.values()).item())
        return found


class Batches:
    """Pictures and the ids of their captions, a batch for each step."""

    def __init__(self, pictures: Pictures, steps: int) -> None:
        self.pixels, self.ids = pictures.pixels, torch.tensor([ids(text) for text in pictures.captions])
        self.num_batches, self.num_samples = steps, steps * BATCH

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.num_batches):
            batch = torch.randint(len(self.ids), (BATCH,))
            yield normalised(self.pixels[batch]), self.ids[batch]


def ids(caption: str) -> list[int]:
    """A caption's words, a sign letter by letter; at the highest id, the end, open_clip takes the feature."""
    words = caption.replace(",", "").split()
    spelled = [part for word in words for part in (word if word.isupper() else [word])]
    found = [WORDS.index(word) for word in ["<start>", *spelled, "<end>"]]
    return found + [0] * (LONGEST - len(found))


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[N, 16, width] of the last block, without the class token."""
    found = model.visual.forward_intermediates(
        normalised(pixels), indices=1, output_fmt="NLC", intermediates_only=True
    )
    return found["image_intermediates"][0]


def save(model: Any, folder: Path) -> None:
    """The visual tower alone: the text tower and the projection are of no use to another model."""
    tensors = {f"visual.{name}": weight.half() for name, weight in model.visual.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {
        "model_cfg": {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")

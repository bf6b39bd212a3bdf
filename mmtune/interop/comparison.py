"""Two forms of one model, compared by their logits on inputs that are always the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.errors import UserError
from mmtune.data.batches import Batch, pad
from mmtune.data.chat import IMAGE, Turn
from mmtune.evaluation.generate import best_device
from mmtune.parts.model import VisionLanguageModel

# Question, answer; a picture for each mark.
CONVERSATIONS = (
    ("What is the capital of France?", "Paris"),
    ("Count from one to ten.", "One, two, three, four, five, six, seven, eight, nine, ten."),
    (f"{IMAGE}\nWhat is shown here?", "Coloured squares."),
    (f"{IMAGE}\nWhich colour is in the top left corner?\nAnswer with a single word.", "Blue"),
    (f"{IMAGE}\n{IMAGE}\nAre these two pictures the same?", "No, they are not."),
)


@dataclass
class Compared:
    """The largest difference of two models' logits, as such and as a part of the largest logit; and at how
    many of the positions both find the same token likeliest. tolerance: of the relative one; None: any.
    Likewise of their inputs: ids, of which some differ or none, and pixels, of which some are the same.
    """

    what: str
    largest: float
    relative: float
    same_token: int
    positions: int
    tolerance: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(model: VisionLanguageModel) -> Batch:
    """Conversations without, with one and with two pictures, as the model's own tokenizer and transform have
    them; the pictures are squares of colours drawn from a seed.
    """
    rows = [
        model.chat.encode([Turn("user", question), Turn("assistant", answer)])[0]
        for question, answer in CONVERSATIONS
    ]
    batch = pad(rows, model.language.pad_id, left=False)
    batch.images = torch.from_numpy(np.stack([model.transform(picture) for picture in pictures()]))
    return batch


def pictures() -> list[Image.Image]:
    """Those of the probe, in the order of its conversations: 320 x 240, squares of colours from a seed."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(sum(question.count(IMAGE) for question, _ in CONVERSATIONS)):
        squares = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        made.append(Image.fromarray(squares).resize((320, 240), Image.Resampling.NEAREST))
    return made


def placed(model: Any) -> Any:
    """A model on this process's accelerator, or as it is where that has no room: 7 billion weights in fp32
    take 28 GB. An eighth more is kept free for the forward pass, and 1 GB.
    """
    device = best_device()
    if device.type == "cuda":
        needed = sum(tensor.nbytes for tensor in model.state_dict().values())
        if needed * 9 / 8 + 2**30 > torch.cuda.mem_get_info(device)[0]:
            return model
    return model.to(device)


@torch.no_grad()
def logits(model: VisionLanguageModel) -> torch.Tensor:
    """At each position of the probe that is no padding, fp32 [n, vocabulary] on the CPU."""
    batch = probe(model).to(next(model.parameters()).device)
    hidden = model.language.hidden(model.splice(batch), batch.attention_mask)
    return model.language.logits(hidden[batch.attention_mask.bool()]).float().cpu()


def compare(what: str, before: torch.Tensor, after: torch.Tensor, tolerance: float | None) -> Compared:
    """Of the logits of two models."""
    largest = float((after - before).abs().max())
    same_token = int((after.argmax(-1) == before.argmax(-1)).sum())
    return Compared(what, largest, largest / float(before.abs().max()), same_token, len(before), tolerance)


def refuse_unlike(compared: Compared, where: str, what: str = "the logits") -> None:
    """Raises UserError where the difference is above the tolerance, or no number."""
    if compared.tolerance is not None and not compared.relative <= compared.tolerance:
        raise UserError(
            f"{compared.what}: {what} differ by {compared.relative:.1e} of the largest, more than "
            f"{compared.tolerance:.0e}; nothing was written",
            where=where,
            mend="Is the model whole? If mmtune eval scores it well, this is a fault of mmtune's.",
        )


def print_compared(rows: Sequence[Compared], console: Console) -> None:
    """A line per comparison."""
    table = Table(title="On a fixed probe", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", "largest difference", "relative", "allowed", "the same token"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        allowed = "any" if row.tolerance is None else f"{row.tolerance:.0e}"
        relative = f"{row.relative:.1e}" if math.isfinite(row.relative) else str(row.relative)
        same = f"{row.same_token} of {row.positions}"
        table.add_row(row.what, f"{row.largest:.1e}", relative, allowed, same)
    console.print(table)

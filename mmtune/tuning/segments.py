"""The retention mask where processes split a frozen weight: M of the run of entries that one of them has.

ZeRO-3 gives each process a run of the flat weight, which may begin and end inside a row; FSDP2 gives it whole
rows. Either is a matrix of whole rows and at most two pieces of rows. The penalty's products are sums over
entries, so each of these is a small weight with a mask of its own that knows the norm of the whole, and what
all processes get adds up to what one would get. The weight itself is never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mmtune.tuning.penalty import ConstantMask, RetentionMask, frobenius, retention_mask

Total = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Some rows and columns of a matrix, and where their entries stand in a run of it."""

    rows: slice
    columns: slice
    entries: slice


def blocks(start: int, length: int, width: int) -> Iterator[Block]:
    """The up to three blocks of `length` entries of a matrix `width` wide, from the flat index `start` on."""
    place, end = start, start + length
    while place < end:
        row, column = divmod(place, width)
        rows = (end - place) // width if column == 0 else 0
        until = place + rows * width if rows else min(end, (row + 1) * width)
        columns = slice(0, width) if rows else slice(column, column + until - place)
        yield Block(slice(row, row + max(rows, 1)), columns, slice(place - start, until - start))
        place = until


class Segment:
    """M of a run of the entries of a frozen weight, block by block.

    entries: [n]; those beyond the weight's own (ZeRO-3 fills up to even lengths) are left out. start: the
    place of the first. shape: (p, q) of the whole weight. rows: those of the weight that the run touches.
    """

    def __init__(self, entries: torch.Tensor, start: int, shape: torch.Size) -> None:
        self.shape, self.device = shape, entries.device
        length = max(0, min(entries.numel(), shape.numel() - start))
        self.blocks = list(blocks(start, length, shape[1]))
        first = start // shape[1]
        self.rows = slice(first, self.blocks[-1].rows.stop if self.blocks else first)
        self.tiles = [
            entries[block.entries].view(block.rows.stop - block.rows.start, -1) for block in self.blocks
        ]
        self.masks: list[RetentionMask] = []

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This run's share of B^T G [r x q], and of G A^T the rows [of b x r]; no autograd.

        a: A [r x q]. b: `rows` of B.
        """
        b_g, g_a = torch.zeros_like(a), torch.zeros_like(b)
        for block, mask in zip(self.blocks, self.masks, strict=True):
            rows = slice(block.rows.start - self.rows.start, block.rows.stop - self.rows.start)
            of_a, of_b = mask.products(a[:, block.columns].contiguous(), b[rows])
            b_g[:, block.columns] += of_a
            g_a[rows] += of_b
        return b_g, g_a

    def sum(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of a number for each block, fp64."""
        return sum(values, start=torch.zeros((), dtype=torch.float64, device=self.device))


class Rows:
    """Some rows of a weight that lies whole on every process, as quantised ones do; to be used as a Segment.

    mask: of the whole weight.
    """

    def __init__(self, mask: RetentionMask, rows: slice) -> None:
        self.rows = rows
        self.mask = RowsMask(mask, rows)

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Segment.products`."""
        return self.mask.products(a, b) if len(b) else (torch.zeros_like(a), torch.zeros_like(b))


class RowsMask(RetentionMask):
    """M of some rows of a weight, from the mask of the whole."""

    def __init__(self, whole: RetentionMask, rows: slice) -> None:
        self.weight, self.omega, self.norm = whole.weight, whole.omega, whole.norm
        self.whole, self.first, self.whole_rows = whole, rows.start, whole.whole_rows
        self.shape = torch.Size((rows.stop - rows.start, whole.shape[1]))

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        self.whole.fill(out, spare, slice(rows.start + self.first, rows.stop + self.first), columns)


def make_masks(segments: Sequence[Segment], omega: float, constant: bool, total: Total) -> None:
    """Gives every run its masks, which need one number of the whole weight: its norm, and the mean of M^2 for
    the control.

    total: sums a tensor over the processes; called once, with `constant` twice.
    """
    squares = [s.sum(frobenius(tile).square() for tile in s.tiles) for s in segments]
    for segment, norm in zip(segments, total(torch.stack(squares)).sqrt().tolist(), strict=True):
        segment.masks = [retention_mask(tile, omega, norm=norm) for tile in segment.tiles]
    if constant:
        sums = [s.sum(mask.mean_square() * mask.shape.numel() for mask in s.masks) for s in segments]
        for segment, square in zip(segments, total(torch.stack(sums)), strict=True):
            segment.masks = [ConstantMask(mask, square / segment.shape.numel()) for mask in segment.masks]

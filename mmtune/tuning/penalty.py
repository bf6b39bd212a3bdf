"""The conflict penalty of LoRASculpt in closed form, one tile of memory.

For a frozen weight W (p x q) and an update D the penalty is N = ||M * D||_F with the retention mask
M = tanh(omega * |1 / ln(|W| / ||W||_F + 1e-15)|): large weights are taken to carry general knowledge,
and an update that falls on them costs more. With D = B A and G = M^2 * D

    dN/dB = G A^T / N        dN/dA = B^T G / N        N^2 = <B, G A^T>

so one pass over tiles of W gives the value and both gradients, and nothing of size p x q is kept.
The control replaces M^2 by its mean c^2 over the matrix: G = c^2 D, and only r x r products are needed.
Where D = 0 (B before its first step) value and gradients are 0. An all-zero W has M = 0.
Source: Liang et al., LoRASculpt, CVPR 2025, arXiv 2503.16843.

M^2 of a weight stored in 16 bits comes from a table over its 15 bits of magnitude, of one stored in 4 bits
(bitsandbytes) from the 16 values of its block, of one in 8 bits from the 129 magnitudes of its row. On a GPU
`penalty_triton` computes M^2 anew while it reads W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.core.errors import UserError

if TYPE_CHECKING:
    from mmtune.tuning.penalty_triton import Stored

TILE_ENTRIES = 1 << 18  # two buffers of 1 MiB
TILE_COLUMNS = 2048  # so a strip of B^T G stays in a processor's cache while all rows are added to it
GPU_TILE_ENTRIES = 1 << 24
MAGNITUDES = 1 << 15  # of a 16-bit number without its sign
TABLE_FROM = MAGNITUDES  # a weight of fewer entries is less work than its table
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def retention_mask_squared(tile: torch.Tensor, norm: torch.Tensor | float, omega: float) -> torch.Tensor:
    """M^2 for some entries of W (fp32 or fp64, any shape), in their place, given ||W||_F; 0 if W is all zero.

    norm: a number, since a tensor on a GPU would make it wait here.
    """
    norm = float(norm)
    if norm == 0:
        return tile.zero_()
    if tile.dtype == torch.float32 and not 1e-25 < norm < 1e25:  # 1 / norm or |W| / norm leaves fp32's range
        return tile.copy_(retention_mask_squared(tile.double(), norm, omega))
    torch.add(tile.new_tensor(1e-15), tile.abs_(), alpha=1 / norm, out=tile)
    # At |W| = ||W||_F the logarithm is 0 and M = tanh(inf) = 1, which the formula gives by itself.
    if tile.device.type != "cpu":
        return tile.log_().reciprocal_().mul_(omega).tanh_().square_()
    # NumPy's logarithm and tanh take 14 ms for 4096 x 4096 on one thread, torch's 60.
    array = tile.numpy()
    with np.errstate(all="ignore"):
        np.log(array, out=array)
        tile.reciprocal_()
        if omega != 1:
            tile.mul_(omega)
        np.tanh(array, out=array)
    return tile.square_()


def frobenius(weight: torch.Tensor) -> torch.Tensor:
    """||W||_F, fp64: a plain fp32 sum on a CPU is 0.3 % off for a 4096 x 11008 matrix."""
    return torch.tensor(RetentionMask(weight).norm, dtype=torch.float64, device=weight.device)


def _square_sum(tile: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of a tile (fp32 or fp64), fp64; spare: like it, overwritten."""
    if tile.device.type == "cpu" and tile.dtype == torch.float32:
        # torch sums fp32 in a cascade, so a tile's sum is good to 1e-7, in half the time of fp64.
        total = torch.mul(tile, tile, out=spare).sum().double()
        if tile.numel() * 1e-30 < total.item() < math.inf:  # else squares left fp32's range
            return total
    return torch.linalg.vector_norm(tile, dtype=torch.float64).square()


def mean_square_mask(weight: torch.Tensor, omega: float = 1.0) -> torch.Tensor:
    """c^2, the mean of M^2 over a weight (p x q), summed in fp64."""
    return retention_mask(weight, omega).mean_square()


class RetentionMask:
    """M of one frozen weight (p x q), tile by tile, with what is known of the whole.

    shape: (p, q). norm: of W, or of what stands in its place: a subclass with another importance than |W|
    overrides `importance`, one that can look M^2 up `fill`.
    """

    whole_rows = False  # whether tiles have to be whole rows

    def __init__(self, weight: torch.Tensor, omega: float = 1.0, norm: float | None = None) -> None:
        self.weight = weight
        self.omega = omega
        self.shape = self._shape()
        self.norm = self._norm() if norm is None else norm

    def _shape(self) -> torch.Size:
        return torch.Size(self.weight.shape)

    def _norm(self) -> float:
        sums = []
        for rows, columns, out, spare in self._tiles(_precision(self.weight)):
            self.importance(out, rows, columns)
            sums.append(_square_sum(out, spare))
        return float(torch.stack(sums).sum().sqrt())

    def importance(self, out: torch.Tensor, rows: slice, columns: slice) -> None:
        """Fills a tile [t, c], fp32 or fp64, with what M is made from; the sign does not matter."""
        out.copy_(self.weight.detach()[rows, columns])

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        """Fills a tile [t, c] with M^2; spare: like it, may be overwritten. Both contiguous."""
        self.importance(out, rows, columns)
        retention_mask_squared(out, self.norm, self.omega)

    def squared(self, rows: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """M^2 of some rows [t, q], fp32 or fp64, a tensor of its own."""
        p, q = self.shape
        height = len(range(p)[rows])
        out = torch.empty(height, q, dtype=dtype, device=self.weight.device)
        self.fill(out, torch.empty_like(out), rows, slice(0, q))
        return out

    def mean_square(self) -> torch.Tensor:
        """c^2, the mean of M^2, summed in fp64."""
        sums = []
        for rows, columns, out, spare in self._tiles(_precision(self.weight)):
            self.fill(out, spare, rows, columns)
            sums.append(out.sum().double())
        return torch.stack(sums).sum() / self.shape.numel()

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B^T G [r x q], G A^T [p x r]) with G = M^2 * (B A), for a (r x q) and b (p x r); no autograd."""
        if (stored := _for_a_gpu(self, a)) is not None:
            b_g, g_a = _on_a_gpu([stored], [self], a[None], b[None])
            return b_g[0], g_a[0]
        b_g, g_a = torch.zeros_like(a), torch.zeros_like(b)
        for rows, columns, g, spare in self._tiles(a.dtype):
            self.fill(g, spare, rows, columns)
            g.mul_(torch.mm(b[rows], a[:, columns], out=spare))
            g_a[rows].addmm_(g, a[:, columns].T)
            b_g[:, columns].addmm_(b[rows].T, g)
        return b_g, g_a

    def stored(self) -> Stored | None:
        """The weight for `penalty_triton`; None where M is made of something else or otherwise."""
        from mmtune.tuning.penalty_triton import TYPES, Stored

        data = self.weight.detach()
        plain = type(self) in (RetentionMask, TableMask) and data.dtype in TYPES and data.is_contiguous()
        return Stored(data) if plain else None

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """Tiles that cover the whole, strip after strip of columns: rows, columns and two buffers [t, c]."""
        p, q = self.shape
        device = self.weight.device
        entries, width = TILE_ENTRIES, min(q, TILE_COLUMNS)
        if device.type != "cpu":
            entries, width = GPU_TILE_ENTRIES, q
        if self.whole_rows:
            width = q
        height = min(p, max(1, entries // width))
        one, other = torch.empty(2, height * width, dtype=dtype, device=device)
        for left in range(0, q, width):
            columns = slice(left, min(left + width, q))
            for top in range(0, p, height):
                rows = slice(top, min(top + height, p))
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                out, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (one, other))
                yield rows, columns, out, spare


class TableMask(RetentionMask):
    """M of a weight stored in 16 bits: a table of M^2 over its 32,768 magnitudes (128 KiB)."""

    def __init__(self, weight: torch.Tensor, omega: float = 1.0, norm: float | None = None) -> None:
        super().__init__(weight, omega, norm)
        magnitudes = torch.arange(MAGNITUDES, dtype=torch.int16, device=weight.device).view(weight.dtype)
        self.table = retention_mask_squared(magnitudes.float(), self.norm, omega)

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        if out.dtype != torch.float32:
            return super().fill(out, spare, rows, columns)
        index = spare.view(torch.int32)
        index.copy_(self.weight.detach()[rows, columns].view(torch.int16)).bitwise_and_(MAGNITUDES - 1)
        torch.index_select(self.table, 0, index.view(-1), out=out.view(-1))


class BlockMask(RetentionMask):
    """M of a weight that bitsandbytes stores in 4 bits (NF4 or FP4): looked up in the 16 values of a block.

    The values are those that bitsandbytes makes, rounded to the type in which it makes them.
    """

    whole_rows = True

    def _shape(self) -> torch.Size:
        state = self._state()
        if len(state.shape) != 2 or state.quant_type not in ("nf4", "fp4"):
            raise _unknown(f"a {state.quant_type} weight of shape {tuple(state.shape)}")
        return torch.Size(state.shape)

    def _state(self) -> Any:
        state: Any = self.weight.quant_state  # type: ignore[attr-defined]
        if getattr(state, "packing_format_for_cpu", False):
            raise _unknown("a 4-bit weight that bitsandbytes has repacked for answering on a CPU")
        return state

    def importance(self, out: torch.Tensor, rows: slice, columns: slice) -> None:
        self._look_up(out, rows, self._values(rows).to(out.dtype))

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        values = self._values(rows).to(out.dtype)
        self._look_up(out, rows, retention_mask_squared(values, self.norm, self.omega))

    def stored(self) -> Stored | None:
        from mmtune.tuning.penalty_triton import Stored

        state = self._state()
        scale = self._largest(0, len(state.absmax)).contiguous()
        code = state.code.float().to(scale.device)
        packed = self.weight.detach().contiguous().view(-1).view(torch.uint8)
        return Stored(packed, scale, code, state.blocksize, state.dtype)

    def _blocks(self, rows: slice) -> tuple[int, int]:
        """The first block of some rows, and the one after the last."""
        size, q = self._state().blocksize, self.shape[1]
        return rows.start * q // size, -(-rows.stop * q // size)

    def _values(self, rows: slice) -> torch.Tensor:
        """The 16 values of each block of some rows [blocks, 16]."""
        state = self._state()
        return (state.code * self._largest(*self._blocks(rows))[:, None]).to(state.dtype)

    def _largest(self, first: int, after: int) -> torch.Tensor:
        """The largest magnitude of each of some blocks, fp32; it may be stored in 8 bits itself."""
        state = self._state()
        largest = state.absmax[first:after]
        if state.nested:
            groups = torch.arange(first, after, device=largest.device) // state.state2.blocksize
            largest = state.state2.code[largest.int()] * state.state2.absmax[groups] + state.offset
        return largest.float()

    def _look_up(self, out: torch.Tensor, rows: slice, table: torch.Tensor) -> None:
        """Fills whole rows [t, q] with each entry's number in its block's row of `table` [blocks, 16]."""
        q, size = self.shape[1], self._state().blocksize
        start, stop = rows.start * q, rows.stop * q
        packed = self.weight.detach().view(-1).view(torch.uint8)[start // 2 : -(-stop // 2)]
        index = torch.empty(len(packed), 2, dtype=torch.int32, device=packed.device)
        index[:, 0] = packed >> 4
        index[:, 1] = packed & 15
        index = index.view(-1)[start % 2 :][: stop - start]
        if start % size == stop % size == 0:
            index.view(-1, size).add_(torch.arange(0, table.numel(), 16, device=index.device)[:, None])
        else:
            entries = torch.arange(start, stop, device=index.device)
            index.add_((entries // size - self._blocks(rows)[0]) * 16)
        torch.index_select(table.view(-1), 0, index, out=out.view(-1))


class RowMask(RetentionMask):
    """M of a weight that bitsandbytes stores in 8 bits: looked up in the 129 magnitudes of its row."""

    whole_rows = True

    def _shape(self) -> torch.Size:
        scale: torch.Tensor | None = getattr(self.weight, "SCB", None)
        if self.weight.dtype != torch.int8 or self.weight.ndim != 2 or scale is None:
            raise _unknown("an 8-bit weight whose scales are not with it (or that is not quantised yet)")
        self.scale = scale.detach().float()  # kept: a layer takes it off its weight when it first runs
        return torch.Size(self.weight.shape)

    def importance(self, out: torch.Tensor, rows: slice, columns: slice) -> None:
        self._look_up(out, rows, self._values(rows).to(out.dtype))

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        values = self._values(rows).to(out.dtype)
        self._look_up(out, rows, retention_mask_squared(values, self.norm, self.omega))

    def stored(self) -> Stored | None:
        from mmtune.tuning.penalty_triton import Stored

        return Stored(self.weight.detach().contiguous(), self.scale.contiguous())

    def _values(self, rows: slice) -> torch.Tensor:
        """The magnitudes of each row [t, 129]."""
        return torch.arange(129, device=self.scale.device) * (self.scale[rows, None] / 127)

    def _look_up(self, out: torch.Tensor, rows: slice, table: torch.Tensor) -> None:
        index = self.weight.detach()[rows].to(torch.int32).abs_()
        index.add_(torch.arange(0, table.numel(), 129, device=index.device)[:, None])
        torch.index_select(table.view(-1), 0, index.view(-1), out=out.view(-1))


class ConstantMask(RetentionMask):
    """The control: M^2 is c^2, its mean over the weight, everywhere; only r x r products are needed."""

    def __init__(self, mask: RetentionMask, square: torch.Tensor | None = None) -> None:
        """square: c^2 of a whole weight of which this is a part."""
        self.weight, self.omega, self.shape, self.norm = mask.weight, mask.omega, mask.shape, mask.norm
        self.square = mask.mean_square() if square is None else square

    def fill(self, out: torch.Tensor, spare: torch.Tensor, rows: slice, columns: slice) -> None:
        out.copy_(self.square.to(out.dtype).expand_as(out))

    def mean_square(self) -> torch.Tensor:
        return self.square

    def products(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        square = self.square.to(a.dtype)
        return square * (b.T @ b) @ a, square * b @ (a @ a.T)


def retention_mask(
    weight: torch.Tensor, omega: float = 1.0, constant: bool = False, norm: float | None = None
) -> RetentionMask:
    """The mask of a frozen weight, to be made once and kept. constant: the control.

    weight: p x q, floating, or a 4-bit or 8-bit parameter of bitsandbytes. norm: of the whole, where this is
    a part of a weight. Raises UserError for a storage whose values are not known here.
    """
    mask = _kind(weight)(weight, omega, norm)
    return ConstantMask(mask) if constant else mask


def _kind(weight: torch.Tensor) -> type[RetentionMask]:
    name = type(weight).__name__  # without importing bitsandbytes
    if name == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return BlockMask
    if name == "Int8Params" and not weight.is_floating_point():
        return RowMask
    if weight.dtype not in FLOATS or weight.ndim != 2:
        raise _unknown(
            f"{name} of {str(weight.dtype).removeprefix('torch.')} and shape {tuple(weight.shape)}"
        )
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        raise _unknown(name)
    return TableMask if weight.element_size() == 2 and weight.numel() > TABLE_FROM else RetentionMask


def _unknown(what: str) -> UserError:
    return UserError(
        f"the penalty cannot read {what}",
        mend="Give it a floating weight, or one quantised to nf4, fp4 or int8 by bitsandbytes.",
    )


def update_penalty(
    mask: RetentionMask, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N = ||M * (B A)||_F and its gradients for A (r x q) and B (p x r), as plain tensors; all 0 at N = 0.

    Computed in fp32, or fp64 where the adapter is.
    """
    return update_penalties([mask], [(lora_a, lora_b)])[0]


def update_penalties(
    masks: Sequence[RetentionMask], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As `update_penalty` for (A, B) of many modules; on a GPU those that are alike share a launch."""
    alike: dict[object, list[int]] = {}
    stored = [_for_a_gpu(mask, a) for mask, (a, _) in zip(masks, pairs, strict=True)]
    for i, (mask, (a, _), one) in enumerate(zip(masks, pairs, stored, strict=True)):
        key = i if one is None else (type(mask), mask.shape, mask.omega, a.shape, a.device, one.kind())
        alike.setdefault(key, []).append(i)
    made: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for numbers in alike.values():
        dtype = _precision(pairs[numbers[0]][0])
        # Under autocast the products would be bf16, in which most of this penalty's gradient is lost.
        with torch.no_grad(), torch.autocast(pairs[numbers[0]][0].device.type, enabled=False):
            a, b = (torch.stack([pairs[i][k].detach().to(dtype) for i in numbers]) for k in (0, 1))
            if stored[numbers[0]] is None:
                b_g, g_a = (made_of[None] for made_of in masks[numbers[0]].products(a[0], b[0]))
            else:
                b_g, g_a = _on_a_gpu([stored[i] for i in numbers], [masks[i] for i in numbers], a, b)
            values = (b * g_a).sum((1, 2)).clamp_min(0).sqrt()
            scales = torch.where(values > 0, 1 / values, torch.zeros_like(values))[:, None, None]
            rows = zip(values, b_g.mul_(scales), g_a.mul_(scales), strict=True)
            made.update(zip(numbers, rows, strict=True))
    return [made[i] for i in range(len(masks))]


def _for_a_gpu(mask: RetentionMask, a: torch.Tensor) -> Stored | None:
    """The weight for `penalty_triton`, where that is to compute the products."""
    return mask.stored() if _launches(mask, a) else None


def _launches(mask: RetentionMask, a: torch.Tensor) -> bool:
    return a.device.type == "cuda" and find_spec("triton") is not None and fits_a_launch(mask, a)


def fits_a_launch(mask: RetentionMask, a: torch.Tensor) -> bool:
    """Whether the kernel's fp32 and 32-bit places and its tiles are enough for a mask and an A (r x q)."""
    in_range = mask.norm == 0 or 1e-25 < mask.norm < 1e25
    return in_range and mask.shape.numel() < 2**31 and len(a) <= 128 and a.dtype != torch.float64


def _on_a_gpu(
    stored: Sequence[Stored | None], masks: Sequence[RetentionMask], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of modules that are alike: (B^T G [n, r, q], G A^T [n, p, r])."""
    from mmtune.tuning.penalty_triton import products

    weights = [one for one in stored if one is not None]
    return products(weights, [mask.norm for mask in masks], masks[0].omega, a.contiguous(), b.contiguous())


def conflict_penalty(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, omega: float = 1.0
) -> torch.Tensor:
    """||M * (B A)||_F as a scalar with gradients for lora_a and lora_b.

    weight: frozen, p x q, any that `retention_mask` takes. lora_a: r x q. lora_b: p x r.
    """
    with torch.no_grad():
        mask = retention_mask(weight, omega)
    return _OfUpdate.apply(lora_a, lora_b, mask)


class _OfUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, mask: RetentionMask) -> torch.Tensor:
        value, grad_a, grad_b = update_penalty(mask, a, b)
        ctx.save_for_backward(grad_a.to(a.dtype), grad_b.to(b.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_a, grad_b = ctx.saved_tensors
        return grad * grad_a, grad * grad_b, None


def drift_penalty(
    weight: torch.Tensor, initial: torch.Tensor, omega: float = 1.0, constant: bool = False
) -> torch.Tensor:
    """||M0 * (W - W0)||_F for a weight that trains in full, M0 from its initial value W0; 0 at W = W0.

    weight, initial: p x q. constant: M0^2 is replaced by its mean, the control. dN/dW = M0^2 * (W - W0) / N.
    """
    return _Drift.apply(weight, initial, omega, constant)


class _Drift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, initial: torch.Tensor, omega: float, constant: bool
    ) -> torch.Tensor:
        dtype = _precision(weight)
        drift = weight.detach().to(dtype) - initial.to(dtype)
        if constant:
            g = drift * mean_square_mask(initial, omega).to(dtype)
        else:
            norm = frobenius(initial).to(dtype)
            g = retention_mask_squared(initial.to(dtype, copy=True), norm, omega).mul_(drift)
        value = (g * drift).sum().clamp_min(0).sqrt()
        scale = torch.where(value > 0, 1 / value, torch.zeros_like(value))
        ctx.save_for_backward((g * scale).to(weight.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None, None


def _precision(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

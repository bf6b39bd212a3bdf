"""The products of the conflict penalty on a GPU: one pass over W, many modules of one shape in a launch.

A program takes a strip of W's rows and walks along its columns. For each tile it makes P = B A and M^2, and
with G = M^2 * P adds to G A^T, which stays in registers, and writes its part of B^T G. The strips' parts are
summed afterwards, in a fixed order: no atomics, so that the same input gives the same bits.

Products are `bf16x3`: each fp32 factor goes to the tensor cores as two bf16 numbers, x = hi + lo, and hi hi,
hi lo and lo hi are summed in fp32. What is left out is some 2^-17 of a product (with TF32 it would be 2^-11).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PARTS_BYTES = 256 << 20  # of the strips' parts of B^T G in one launch
COLUMNS = 32  # of a tile
INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Stored(NamedTuple):
    """A weight (p x q) as it is stored.

    data: floating; int8 with `scale` per row; or uint8 of two 4-bit numbers each, the first in the higher
    bits, with `scale` per `block` entries and the `code` of 16 values, rounded to `rounded`.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    code: torch.Tensor | None = None
    block: int = 1
    rounded: torch.dtype = torch.float32

    def kind(self) -> tuple[object, ...]:
        """What weights have to share for one launch."""
        return self.data.dtype, self.scale is None, self.code is None, self.block, self.rounded


def strip(ranks: int) -> int:
    """The rows of a program: as many as fit the 99 KiB of shared memory of a consumer GPU."""
    return 128 if ranks <= 32 else 64


def options(ranks: int) -> dict[str, int]:
    """Of the compilation, likewise."""
    return {"num_warps": 8, "num_stages": 2 if ranks <= 64 else 1}


def products(
    weights: list[Stored], norms: list[float], omega: float, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B^T G [n, r, q], G A^T [n, p, r]) of n modules, fp32; no autograd.

    weights: stored alike, contiguous, of fewer than 2^31 entries. norms: ||W||_F of each, 0 or between 1e-25
    and 1e25, as fp32 asks. a: [n, r, q], b: [n, p, r], fp32, contiguous.
    """
    (n, r, q), p = a.shape, b.shape[1]
    strips = triton.cdiv(p, strip(_ranks(r)))
    b_g, g_a = torch.empty_like(a), torch.empty_like(b)
    some = max(1, PARTS_BYTES // (4 * strips * r * q))
    for start in range(0, n, some):
        part = slice(start, start + some)
        _launch(weights[part], norms[part], omega, a[part], b[part], b_g[part], g_a[part])
    return b_g, g_a


def _launch(
    weights: list[Stored],
    norms: list[float],
    omega: float,
    a: torch.Tensor,
    b: torch.Tensor,
    b_g: torch.Tensor,
    g_a: torch.Tensor,
) -> None:
    (n, r, q), p, one = a.shape, b.shape[1], weights[0]
    ranks = _ranks(r)
    strips = triton.cdiv(p, strip(ranks))
    data = [w.data.data_ptr() for w in weights]
    scales = [0 if w.scale is None else w.scale.data_ptr() for w in weights]
    pointers = torch.tensor([data, scales]).to(a.device, non_blocking=True)
    # An all-zero W has M = tanh(0 / ...) = 0.
    known = [[1 / norm if norm else 1.0 for norm in norms], [omega if norm else 0.0 for norm in norms]]
    numbers = torch.tensor(known, dtype=torch.float32).to(a.device, non_blocking=True)
    parts = torch.empty(n, strips, r, q, device=a.device)
    _products[(strips, n)](
        pointers,
        numbers,
        a if one.code is None else one.code,
        a,
        b,
        g_a,
        parts,
        n,
        p,
        q,
        r,
        KIND="float" if one.scale is None else "rows" if one.code is None else "blocks",
        TYPE=TYPES.get(one.data.dtype, tl.int8 if one.data.dtype == torch.int8 else tl.uint8),
        ROUNDED=TYPES[one.rounded],
        BLOCK=one.block,
        ALIGNED=all(pointer % 16 == 0 for pointer in data),
        PRECISION="ieee" if INTERPRETED else "bf16x3",  # the interpreter has no bf16x3
        P=strip(ranks),
        Q=COLUMNS,
        R=ranks,
        **options(ranks),
    )
    torch.sum(parts, 1, out=b_g)


def _ranks(r: int) -> int:
    """The columns of a tile that holds r of them: tensor cores take 16 at least."""
    return max(16, int(triton.next_power_of_2(r)))


@triton.jit
def _mask_squared(w, inverse_norm, omega):  # type: ignore[no-untyped-def]
    """M^2 = tanh(y)^2 with y = omega / |ln(|w| / norm + 1e-15)|; at |w| = norm y is infinite and M is 1."""
    y = tl.abs(omega / tl.log(tl.abs(w) * inverse_norm + 1e-15))
    square = y * y
    small = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    shrunk = tl.exp(-2.0 * y)
    m = tl.where(y < 0.25, small, (1.0 - shrunk) / (1.0 + shrunk))  # either is good to 4e-7 where it is used
    return m * m


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    pointers,
    numbers,
    code,
    a,
    b,
    g_a,
    parts,
    n,
    p,
    q,
    r,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    strip, strips = tl.program_id(0), tl.num_programs(0)
    module = tl.program_id(1).to(tl.int64)
    weight = tl.load(pointers + module).to(tl.pointer_type(TYPE))
    scale = tl.load(pointers + n + module).to(tl.pointer_type(tl.float32))
    if ALIGNED:  # else each entry would be loaded by itself
        weight = tl.multiple_of(weight, 16)
    inverse_norm, omega = tl.load(numbers + module), tl.load(numbers + n + module)
    a += module * r * q
    b += module * p * r
    g_a += module * p * r
    parts += (module * strips + strip) * r * q

    rows = strip * P + tl.arange(0, P)[:, None]
    ranks = tl.arange(0, R)
    in_b = (rows < p) & (ranks[None, :] < r)
    b_tile = tl.load(b + rows * r + ranks[None, :], mask=in_b, other=0.0)
    total = tl.zeros((P, R), dtype=tl.float32)
    if KIND == "rows":
        row_scale = tl.load(scale + rows, mask=rows < p, other=0.0) * (1.0 / 127.0)
    for left in range(0, q, Q):
        columns = left + tl.arange(0, Q)[None, :]
        in_a = (ranks[:, None] < r) & (columns < q)
        a_tile = tl.load(a + ranks[:, None] * q + columns, mask=in_a, other=0.0)
        inside = (rows < p) & (columns < q)
        entries = rows * q + columns
        if KIND == "blocks":
            pair = tl.load(weight + entries // 2, mask=inside, other=0).to(tl.int32)
            number = tl.where(entries % 2 == 0, pair >> 4, pair & 15)
            w = tl.load(code + number) * tl.load(scale + entries // BLOCK, mask=inside, other=0.0)
            w = w.to(ROUNDED).to(tl.float32)
        else:
            w = tl.load(weight + entries, mask=inside, other=0).to(tl.float32)
            if KIND == "rows":
                w *= row_scale
        g = tl.dot(b_tile, a_tile, input_precision=PRECISION) * _mask_squared(w, inverse_norm, omega)
        total = tl.dot(g, tl.trans(a_tile), total, input_precision=PRECISION)
        part = tl.dot(tl.trans(b_tile), g, input_precision=PRECISION)
        tl.store(parts + ranks[:, None] * q + columns, part, mask=in_a)
    tl.store(g_a + rows * r + ranks[None, :], total, mask=in_b)

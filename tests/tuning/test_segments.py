"""A weight cut into runs gives, added up, what the whole gives: against fp64 autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.tuning.penalty import retention_mask
from mmtune.tuning.segments import Rows, Segment, blocks, make_masks
from mmtune.tuning.shards import even


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 80), st.integers(0, 80))
def test_blocks_cover_each_entry_once_and_in_place(width: int, start: int, length: int) -> None:
    matrix = torch.arange(200 * width).view(200, width)
    made = list(blocks(start, length, width))
    assert len(made) <= 3
    run = torch.arange(start, start + length)
    found = [matrix[block.rows, block.columns].flatten() for block in made]
    assert torch.equal(torch.cat([run[:0], *found]), run)
    assert all(torch.equal(run[b.entries], f) for b, f in zip(made, found, strict=True))


def reference(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, omega: float, constant: bool
) -> tuple[torch.Tensor, ...]:
    """N and its gradients by autograd, fp64, as the paper writes it."""
    weight = weight.double()
    leaves = [t.double().requires_grad_() for t in (a, b)]
    mask = torch.tanh(omega * (1 / torch.log(weight.abs() / weight.norm() + 1e-15)).abs())
    if constant:
        mask = mask.square().mean().sqrt()
    value = (mask * (leaves[1] @ leaves[0])).norm()
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("constant", [False, True])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sums_over_any_split_are_those_of_the_whole(constant: bool, data: st.DataObject) -> None:
    p, q, r = (data.draw(st.integers(1, most)) for most in (12, 12, 4))
    cuts = sorted(data.draw(st.lists(st.integers(0, p * q), max_size=4)))
    padding = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randn(p, q, generator=generator).to(dtype)
    a, b = torch.randn(r, q, generator=generator), torch.randn(p, r, generator=generator)
    expected = reference(weight, a, b, 1.5, constant)

    flat = torch.cat([weight.flatten(), torch.full((padding,), 7.0, dtype=dtype)])
    ends = [*cuts, flat.numel()]
    runs = [Segment(flat[i:j], i, weight.shape) for i, j in zip([0, *cuts], ends, strict=True)]
    # Each run stands for a process here, so the total over processes is the sum over runs.
    make_masks(runs, 1.5, constant, lambda values: values.sum().expand(len(values)))
    b_g, g_a = torch.zeros_like(a), torch.zeros_like(b)
    for run in runs:
        of_a, of_b = run.products(a, b[run.rows])
        b_g += of_a
        g_a[run.rows] += of_b
    value = (b * g_a).sum().sqrt()
    for found, wanted in zip((value, b_g / value, g_a / value), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_rows_of_a_whole_weight_add_up(count: int, constant: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((7, 5), (2, 5), (7, 2)))
    mask = retention_mask(weight, 1.5, constant)
    b_g, g_a = torch.zeros_like(a), torch.zeros_like(b)
    for rank in range(count):
        run = Rows(mask, even(7, rank, count))
        of_a, of_b = run.products(a, b[run.rows])
        b_g += of_a
        g_a[run.rows] += of_b
    for found, wanted in zip((b_g, g_a), mask.products(a, b), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("rows", "count"), [(0, 2), (1, 4), (3, 4), (8, 2), (9, 4)])
def test_rows_are_dealt_as_torch_chunks_them(rows: int, count: int) -> None:
    """FSDP2 cuts with torch.chunk, whose missing chunks are empty."""
    whole = torch.arange(rows)
    chunks = [*torch.chunk(whole, count), *[whole[:0]] * count][:count]
    for rank, chunk in enumerate(chunks):
        assert whole[even(rows, rank, count)].tolist() == chunk.tolist()


def test_an_empty_run_and_a_weight_of_zeros_give_nothing() -> None:
    a, b = torch.ones(2, 5), torch.ones(7, 2)
    empty = Segment(torch.empty(0), 35, torch.Size([7, 5]))
    zeros = Segment(torch.zeros(35), 0, torch.Size([7, 5]))
    make_masks([empty, zeros], 1.0, False, lambda values: values)
    for run in (empty, zeros):
        assert not any(each.any() for each in run.products(a, b[run.rows]))

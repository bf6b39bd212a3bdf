"""The kernel in Triton's interpreter, on CPU tensors; `test_penalty_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from mmtune.tuning import penalty, penalty_triton
from mmtune.tuning.penalty import ConstantMask, RetentionMask, conflict_penalty, retention_mask
from tests.tuning.test_penalty import assert_near, conflict_expected, drawn, four_bit

SHAPES = [(1, 1, 1), (130, 70, 5), (64, 128, 16), (257, 33, 40), (20, 9, 128)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert penalty_triton.INTERPRETED
    monkeypatch.setattr(penalty, "_launches", penalty.fits_a_launch)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # what the kernel does not do would fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Three modules in one launch, one of them all zero, one with a norm that is its largest weight."""
    tensors = [drawn(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    weights = [weight.to(dtype) for weight, _, _ in tensors]
    weights[1].zero_()
    weights[2].zero_()[-1, 0] = -3
    pairs = [(a, b) for _, a, b in tensors]
    found = penalty.update_penalties([retention_mask(weight) for weight in weights], pairs)
    for weight, (a, b), mine in zip(weights, pairs, found, strict=True):
        near = 1e-5 if weight.numel() > 1 else 1e-3
        assert_near(list(mine), conflict_expected(weight, a, b), near)
    assert not any(t.any() for t in found[1])


@pytest.mark.parametrize("omega", [0.001, 0.3, 5.0])
def test_omega(omega: float) -> None:
    weight, a, b = drawn(40, 50, 4, dtype=torch.float32)
    found = penalty.update_penalty(retention_mask(weight, omega), a, b)
    assert_near(list(found), conflict_expected(weight, a, b, omega), 1e-5)


def test_unlike_modules_and_other_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its own result, in the order asked for; what the kernel does not know it does not touch."""
    monkeypatch.undo()
    monkeypatch.setattr(penalty, "_launches", penalty.fits_a_launch)  # not that there is no addmm_

    class Doubled(RetentionMask):
        def importance(self, out: torch.Tensor, rows: slice, columns: slice) -> None:
            torch.square(self.weight[rows, columns], out=out)

    tensors = [drawn(*shape, dtype=torch.float32) for shape in ((40, 50, 4), (30, 50, 4), (40, 50, 4))]
    masks = [retention_mask(weight) for weight, _, _ in tensors]
    masks += [Doubled(tensors[0][0]), ConstantMask(masks[0])]
    tensors += [tensors[0], tensors[0]]
    found = penalty.update_penalties(masks, [(a, b) for _, a, b in tensors])
    for i, (weight, a, b) in enumerate(tensors[:4]):
        assert_near(list(found[i]), conflict_expected(weight.square() if i == 3 else weight, a, b), 1e-5)
    assert masks[3].stored() is None and masks[4].stored() is None
    _, a, b = tensors[0]
    expected = masks[0].mean_square().sqrt() * torch.linalg.matrix_norm(b @ a)
    assert found[4][0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parts of all modules are more than memory should hold, a launch takes some of them."""
    tensors = [drawn(140, 20, 3, seed=seed, dtype=torch.float32) for seed in range(3)]
    masks = [retention_mask(weight) for weight, _, _ in tensors]
    whole = penalty.update_penalties(masks, [(a, b) for _, a, b in tensors])
    monkeypatch.setattr(penalty_triton, "PARTS_BYTES", 1)
    parts = penalty.update_penalties(masks, [(a, b) for _, a, b in tensors])
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    ("shape", "dtype"),  # none in bf16, to which the interpreter does not round but cuts off
    [((40, 64, 4), torch.float32), ((31, 50, 4), torch.float16), ((33, 35, 4), torch.float16)],
    ids=str,
)
def test_four_bits(shape: tuple[int, int, int], dtype: torch.dtype, nested: bool) -> None:
    weight, a, b = drawn(*shape, dtype=torch.float32)
    stored, made = four_bit(weight.to(dtype), "nf4", 64, nested)
    assert_near(
        list(penalty.update_penalty(retention_mask(stored), a, b)), conflict_expected(made, a, b), 1e-5
    )


def test_eight_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, a, b = drawn(40, 30, 4, dtype=torch.float32)
    stored = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    made = bnb.functional.int8_vectorwise_dequant(stored.CB, stored.SCB)
    assert_near(
        list(penalty.update_penalty(retention_mask(stored), a, b)), conflict_expected(made, a, b), 1e-5
    )


def test_through_autograd() -> None:
    weight, a, b = drawn(40, 50, 4, dtype=torch.float32)
    value = conflict_penalty(weight, a.requires_grad_(), b.requires_grad_())
    found = [value.detach(), *torch.autograd.grad(value, (a, b))]
    assert_near(found, conflict_expected(weight, a.detach(), b.detach()), 1e-5)

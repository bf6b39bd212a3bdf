"""The penalties against the plain fp64 reference, which is differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtune.tuning import penalty
from mmtune.tuning.penalty import (
    conflict_penalty,
    constant_penalty,
    drift_penalty,
    frobenius,
    mean_square_mask,
)
from tests.tuning import lorasculpt_reference as reference


def drawn(p: int, q: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """W, A and B, drawn in fp64 and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((p, q), (rank, q), (p, rank))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def value_and_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def conflict(weight: Tensor, a: Tensor, b: Tensor, omega: float = 1.0) -> list[Tensor]:
    return value_and_gradients(lambda a, b: conflict_penalty(weight, a, b, omega), a, b)


def conflict_expected(weight: Tensor, a: Tensor, b: Tensor, omega: float = 1.0) -> list[Tensor]:
    w, a, b = weight.double(), a.double(), b.double()
    return value_and_gradients(lambda a, b: reference.conflict_penalty(w, a, b, omega), a, b)


def assert_near(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """Each within `relative` of the expected tensor's norm."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        error = torch.linalg.vector_norm(mine.double() - theirs)
        assert error <= relative * torch.linalg.vector_norm(theirs)


@pytest.fixture(params=[1, 7, 64, 1 << 20], ids=lambda entries: f"tile_{entries}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one row, of some rows with a remainder, and of the whole."""
    monkeypatch.setattr(penalty, "TILE_ENTRIES", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("omega", [0.3, 1.0, 5.0])
def test_conflict_equals_the_reference(dtype: torch.dtype, relative: float, omega: float) -> None:
    weight, a, b = drawn(23, 17, 4, dtype=dtype)
    found = conflict(weight, a, b, omega)
    assert [t.dtype for t in found] == [dtype] * 3
    assert_near(found, conflict_expected(weight, a, b, omega), relative)


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(1, 30),
    q=st.integers(1, 30),
    rank=st.integers(1, 8),
    omega=st.floats(0.01, 50),
    rows_per_tile=st.integers(1, 31),
    seed=st.integers(0, 1000),
)
def test_conflict_for_any_shape(
    p: int, q: int, rank: int, omega: float, rows_per_tile: int, seed: int
) -> None:
    weight, a, b = drawn(p, q, rank, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalty, "TILE_ENTRIES", rows_per_tile * q)
        # A single weight is the whole norm, where M turns on the last bit: any value near 1 is right.
        near = 1e-10 if p * q > 1 else 1e-3
        assert_near(conflict(weight, a, b, omega), conflict_expected(weight, a, b, omega), near)


def test_conflict_on_a_large_bf16_weight_in_fp32() -> None:
    """The mask comes from the rounded weight; everything after it is fp32."""
    weight, a, b = drawn(300, 200, 8, dtype=torch.float32)
    found = conflict(weight.bfloat16(), a, b)
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert_near(found, conflict_expected(weight.bfloat16(), a, b), 1e-5)


def test_a_known_norm_changes_nothing() -> None:
    weight, a, b = drawn(9, 11, 3)
    known = conflict_penalty(weight, a, b, 1.0, frobenius(weight))
    assert torch.equal(known, conflict_penalty(weight, a, b))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_norm_of_many_small_weights(dtype: torch.dtype) -> None:
    """In bf16 a sum of small squares stands still, in fp32 it drifts away."""
    weight = torch.full((300, 300), 0.01).to(dtype)
    assert frobenius(weight).item() == pytest.approx(300 * weight[0, 0].item(), rel=1e-9)


def test_gradcheck() -> None:
    weight, a, b = drawn(6, 5, 2)
    a.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: 3 * conflict_penalty(weight, a, b), (a, b))
    trained = (weight + 0.1 * drawn(6, 5, 2, seed=1)[0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: 3 * drift_penalty(w, weight), (trained,))


@pytest.mark.parametrize("zero", ["a", "b", "weight"])
def test_zeros_give_zero_and_no_nan(zero: str) -> None:
    """B before its first step, and a weight that is all zero, which retains nothing."""
    tensors = dict(zip(("weight", "a", "b"), drawn(6, 5, 2), strict=True))
    tensors[zero].zero_()
    for found in conflict(tensors["weight"], tensors["a"], tensors["b"]):
        assert not found.any()


def test_some_zero_weights() -> None:
    weight, a, b = drawn(6, 5, 2)
    weight[weight.abs() < 0.5] = 0
    assert_near(conflict(weight, a, b), conflict_expected(weight, a, b), 1e-10)


def test_one_weight_that_is_the_whole_norm() -> None:
    weight, a, b = drawn(6, 5, 2)
    weight.zero_()[2, 3] = -4.0
    assert_near(conflict(weight, a, b), conflict_expected(weight, a, b), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    weight, a, b = drawn(40, 30, 4, dtype=dtype)
    plain = conflict(weight, a, b)
    plain_drift = value_and_gradients(lambda w: drift_penalty(w, weight), weight + 0.1)
    c2 = mean_square_mask(weight)
    plain_constant = value_and_gradients(lambda a, b: constant_penalty(c2, a, b), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        inside = conflict(weight, a, b)
        inside_drift = value_and_gradients(lambda w: drift_penalty(w, weight), weight + 0.1)
        inside_constant = value_and_gradients(lambda a, b: constant_penalty(c2, a, b), a, b)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(plain_drift, inside_drift, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(plain_constant, inside_constant, strict=True))


def test_the_frozen_weight_gets_no_gradient() -> None:
    weight, a, b = drawn(6, 5, 2)
    weight.requires_grad_()
    conflict_penalty(weight, a.requires_grad_(), b.requires_grad_()).backward()
    assert weight.grad is None
    initial = torch.zeros(6, 5, requires_grad=True)
    drift_penalty(torch.ones(6, 5, requires_grad=True), initial).backward()
    assert initial.grad is None


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("omega", [0.3, 1.0, 5.0])
def test_drift_equals_the_reference(dtype: torch.dtype, relative: float, omega: float) -> None:
    initial = drawn(23, 17, 1, dtype=dtype)[0]
    trained = initial + 0.1 * drawn(23, 17, 1, seed=1, dtype=dtype)[0]
    found = value_and_gradients(lambda w: drift_penalty(w, initial, omega), trained)
    expected = value_and_gradients(
        lambda w: reference.full_penalty(w, initial.double(), omega), trained.double()
    )
    assert [t.dtype for t in found] == [dtype] * 2
    assert_near(found, expected, relative)


def level(weight: Tensor, omega: float) -> Tensor:
    """c, the root mean square of the mask."""
    return reference.retention_mask(weight, omega).square().mean().sqrt()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("omega", [0.3, 1.0, 5.0])
def test_a_constant_mask_equals_the_reference(dtype: torch.dtype, relative: float, omega: float) -> None:
    """On B A and on drift alike, with the mask's mean weight and nothing of its shape."""
    weight, a, b = drawn(23, 17, 4, dtype=dtype)
    c = level(weight, omega)
    found = value_and_gradients(lambda a, b: constant_penalty(mean_square_mask(weight, omega), a, b), a, b)
    expected = value_and_gradients(lambda a, b: reference.frobenius_norm(c * (b @ a)), a.double(), b.double())
    assert [t.dtype for t in found] == [dtype] * 3
    assert_near(found, expected, relative)

    trained = weight + 0.1 * drawn(23, 17, 1, seed=1, dtype=dtype)[0]
    drift = value_and_gradients(lambda w: drift_penalty(w, weight, omega, constant=True), trained)
    expected = value_and_gradients(
        lambda w: reference.frobenius_norm(c * (w - weight.double())), trained.double()
    )
    assert_near(drift, expected, relative)
    shaped = value_and_gradients(lambda w: drift_penalty(w, weight, omega), trained)
    assert (shaped[1] - drift[1]).abs().max() > 0.01 * drift[1].abs().max()


def test_a_constant_mask_of_a_bf16_weight_is_summed_in_fp64() -> None:
    weight = drawn(300, 200, 1, dtype=torch.bfloat16)[0]
    expected = level(weight, 1.0).square().item()
    assert mean_square_mask(weight).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("zero", ["a", "b", "weight"])
def test_a_constant_mask_gives_zero_and_no_nan(zero: str) -> None:
    tensors = dict(zip(("weight", "a", "b"), drawn(6, 5, 2), strict=True))
    tensors[zero].zero_()
    c2 = mean_square_mask(tensors["weight"])
    for found in value_and_gradients(lambda a, b: constant_penalty(c2, a, b), tensors["a"], tensors["b"]):
        assert not found.any()
    weight = tensors["weight"]
    assert not any(
        t.any()
        for t in value_and_gradients(lambda w: drift_penalty(w, weight, constant=True), weight.clone())
    )


def test_no_drift_and_a_zero_start_give_zero_and_no_nan() -> None:
    weight = drawn(6, 5, 1)[0]
    for trained, initial in ((weight, weight.clone()), (weight, torch.zeros_like(weight))):
        found = value_and_gradients(lambda w, initial=initial: drift_penalty(w, initial), trained)
        assert not any(t.any() for t in found)


def test_the_gradient_scales_with_what_comes_from_above() -> None:
    weight, a, b = drawn(6, 5, 2)
    one = conflict(weight, a, b)
    seven = value_and_gradients(lambda a, b: 7 * conflict_penalty(weight, a, b), a, b)
    assert_near(seven, [7 * t for t in one], 1e-12)

"""The penalties against the plain fp64 reference, which is differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtune.core.errors import UserError
from mmtune.tuning import penalty
from mmtune.tuning.penalty import (
    RetentionMask,
    conflict_penalty,
    drift_penalty,
    frobenius,
    mean_square_mask,
    retention_mask,
    update_penalty,
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


def constant(weight: Tensor, a: Tensor, b: Tensor, omega: float = 1.0) -> list[Tensor]:
    return list(update_penalty(retention_mask(weight, omega, constant=True), a, b))


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


def test_a_kept_mask_gives_the_same() -> None:
    weight, a, b = drawn(9, 11, 3)
    mask = retention_mask(weight, 2.0)
    for _ in range(2):
        assert all(
            torch.equal(x, y)
            for x, y in zip(update_penalty(mask, a, b), conflict(weight, a, b, 2), strict=True)
        )


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_norm_of_many_small_weights(dtype: torch.dtype) -> None:
    """In bf16 a sum of small squares stands still, in fp32 it drifts away."""
    weight = torch.full((300, 300), 0.01).to(dtype)
    assert frobenius(weight).item() == pytest.approx(300 * weight[0, 0].item(), rel=2e-7)


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
    plain_constant = constant(weight, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        inside = conflict(weight, a, b)
        inside_drift = value_and_gradients(lambda w: drift_penalty(w, weight), weight + 0.1)
        inside_constant = constant(weight, a, b)
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
    found = constant(weight, a, b, omega)
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
    for found in constant(tensors["weight"], tensors["a"], tensors["b"]):
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


EXTREMES = {
    "one row": (1, 40, 4),
    "one column": (40, 1, 4),
    "one entry": (1, 1, 1),
    "rank above both": (5, 7, 12),
    "many": (210, 333, 16),
}
STORED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("shape", EXTREMES.values(), ids=EXTREMES.keys())
def test_fp32_adapters_are_within_1e_5_of_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, a, b = drawn(*shape, dtype=torch.float32)
    # A single weight is the whole norm, where the fp64 formula turns on its last bit.
    near = 1e-5 if weight.numel() > 1 else 1e-3
    assert_near(conflict(weight.to(dtype), a, b), conflict_expected(weight.to(dtype), a, b), near)


@settings(max_examples=40, deadline=None)
@given(
    p=st.integers(1, 60),
    q=st.integers(2, 60),
    rank=st.integers(1, 20),
    omega=st.sampled_from([0.05, 1.0, 7.0]),
    dtype=st.sampled_from(STORED),
    entries=st.integers(1, 4000),
    columns=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_tables_and_tiles_of_any_shape(
    p: int, q: int, rank: int, omega: float, dtype: torch.dtype, entries: int, columns: int, seed: int
) -> None:
    weight, a, b = drawn(p, q, rank, seed, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalty, "TILE_ENTRIES", entries)
        patch.setattr(penalty, "TILE_COLUMNS", columns)
        patch.setattr(penalty, "TABLE_FROM", 0)
        stored = weight.to(dtype)
        assert isinstance(retention_mask(stored), penalty.TableMask) == (dtype != torch.float32)
        assert_near(conflict(stored, a, b, omega), conflict_expected(stored, a, b, omega), 1e-5)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_weight_of_one_repeated_value(dtype: torch.dtype) -> None:
    _, a, b = drawn(230, 190, 8, dtype=torch.float32)
    weight = torch.full((230, 190), -0.03).to(dtype)
    assert_near(conflict(weight, a, b), conflict_expected(weight, a, b), 1e-5)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_every_magnitude_that_16_bits_hold(dtype: torch.dtype) -> None:
    """Zero, denormals and the largest, with a norm that leaves fp32's range; denormals alone, and the least
    of them, where 1 / norm leaves it.
    """
    of = torch.bfloat16 if dtype == torch.float32 else dtype
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(of)
    every = torch.where(every.isfinite(), every, 0).to(dtype).view(256, 256)
    tiny = torch.where(every.abs() < 8 * torch.finfo(of).tiny, every, 0)
    least = torch.where(every.abs() < 5 * torch.finfo(of).smallest_normal * torch.finfo(of).eps, every, 0)
    for weight in (every, tiny, least):
        assert weight.any()
        _, a, b = drawn(256, 256, 8, dtype=torch.float32)
        assert_near(conflict(weight, a, b), conflict_expected(weight, a, b), 1e-5)
        squared = retention_mask(weight).squared(slice(None))
        assert torch.allclose(squared.double(), reference.retention_mask(weight).square(), rtol=1e-4)


@pytest.mark.parametrize("zero", ["a", "b", "weight"])
def test_zeros_give_zero_for_16_bit_weights_too(zero: str) -> None:
    tensors = dict(zip(("weight", "a", "b"), drawn(200, 250, 2, dtype=torch.float32), strict=True))
    tensors[zero].zero_()
    for found in conflict(tensors["weight"].bfloat16(), tensors["a"], tensors["b"]):
        assert not found.any()


def test_bf16_adapters_lose_only_their_gradients_rounding() -> None:
    """They are computed in fp32 from what the adapter holds; a gradient is rounded once, at the end."""
    weight, a, b = drawn(300, 200, 8, dtype=torch.bfloat16)
    found, expected = conflict(weight, a, b), conflict_expected(weight, a, b)
    assert found[0].dtype == torch.float32
    assert_near(found[:1], expected[:1], 1e-6)
    assert [t.dtype for t in found[1:]] == [torch.bfloat16] * 2
    assert_near(found[1:], expected[1:], 3e-3)


def four_bit(weight: Tensor, kind: str, size: int, nested: bool) -> tuple[Any, Tensor]:
    """The parameter of bitsandbytes, and what bitsandbytes makes of it."""
    bnb = pytest.importorskip("bitsandbytes")
    stored = bnb.nn.Params4bit(
        weight, quant_type=kind, blocksize=size, compress_statistics=nested, requires_grad=False
    ).to("cpu")
    assert stored.dtype == torch.uint8
    state = copy(stored.quant_state)
    if weight.numel() % size == 0:  # a block to a row: its kernel for CPUs is wrong where rows end inside one
        state.shape = torch.Size((weight.numel() // size, size))
    made = bnb.functional.dequantize_4bit(stored.data, state).view(weight.shape)
    assert_near([made], [weight.double()], 0.15)
    return stored, made


@pytest.mark.parametrize("entries", [50, 1000, 1 << 18])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((48, 128), 64, torch.float32),
        ((300, 256), 64, torch.bfloat16),
        ((40, 96), 64, torch.float16),  # rows end inside a block
        ((31, 50), 32, torch.float32),
        ((33, 35), 64, torch.float32),  # and inside a byte
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(
    kind: str,
    shape: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    nested: bool,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(penalty, "TILE_ENTRIES", entries)
    weight, a, b = drawn(*shape, 8, dtype=torch.float32)
    stored, made = four_bit(weight.to(dtype), kind, size, nested)
    assert_near(conflict(stored, a, b), conflict_expected(made, a, b), 1e-5)
    mask = retention_mask(stored)
    assert mask.shape == shape
    expected = reference.retention_mask(made).square()
    assert torch.allclose(mask.squared(slice(3, 17)).double(), expected[3:17], rtol=1e-5)
    for found in conflict(stored, a, torch.zeros_like(b)):
        assert not found.any()
    assert_near(constant(stored, a, b), constant(made, a, b), 1e-5)


def test_a_four_bit_weight_of_zeros() -> None:
    _, a, b = drawn(32, 64, 2, dtype=torch.float32)
    for found in conflict(four_bit(torch.zeros(32, 64), "nf4", 64, False)[0], a, b):
        assert not found.any()


@pytest.mark.parametrize("entries", [50, 1 << 18])
def test_eight_bits(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(penalty, "TILE_ENTRIES", entries)
    weight, a, b = drawn(40, 30, 4, dtype=torch.float32)
    layer = bnb.nn.Linear8bitLt(30, 40, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    stored = layer.weight
    assert stored.dtype == torch.int8
    made = bnb.functional.int8_vectorwise_dequant(stored.CB, stored.SCB)
    assert_near([made], [weight.double()], 0.02)
    mask = retention_mask(stored)
    layer(torch.randn(2, 30))  # takes the scales off the weight
    expected = conflict_expected(made, a, b)
    assert_near(list(update_penalty(mask, a, b)), expected, 1e-5)
    assert torch.allclose(
        mask.squared(slice(None)).double(), reference.retention_mask(made).square(), rtol=1e-5
    )
    with pytest.raises(UserError, match="scales"):
        retention_mask(stored)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
        torch.ones(4, 4, dtype=torch.uint8),
        torch.ones(4),
        torch.ones(2, 2, 2),
    ],
    ids=["int8", "fp8", "uint8", "vector", "cube"],
)
def test_an_unknown_storage_is_refused(weight: Tensor) -> None:
    with pytest.raises(UserError, match="cannot read"):
        retention_mask(weight)


def test_four_bits_not_quantised_yet_or_repacked_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="Params4bit"):
        retention_mask(bnb.nn.Params4bit(torch.ones(4, 4), requires_grad=False))
    stored, _ = four_bit(torch.randn(32, 64), "nf4", 64, False)
    mask = retention_mask(stored)
    stored.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="repacked"):
        mask.squared(slice(None))


def test_another_importance_needs_one_method() -> None:
    weight, a, b = drawn(60, 70, 4, dtype=torch.float32)
    columns_factor = torch.rand(70) + 0.5

    class Scaled(RetentionMask):
        def importance(self, out: Tensor, rows: slice, columns: slice) -> None:
            torch.mul(self.weight[rows, columns], columns_factor[columns], out=out)

    found = update_penalty(Scaled(weight), a, b)
    assert_near(list(found), conflict_expected(weight * columns_factor, a, b), 1e-5)


def test_the_gradient_scales_with_what_comes_from_above() -> None:
    weight, a, b = drawn(6, 5, 2)
    one = conflict(weight, a, b)
    seven = value_and_gradients(lambda a, b: 7 * conflict_penalty(weight, a, b), a, b)
    assert_near(seven, [7 * t for t in one], 1e-12)

"""The reference is checked against arithmetic, finite differences, closed forms and torch's own optimiser."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tuning.lorasculpt_reference import (
    IGNORED,
    Batch,
    Layer,
    StepRecord,
    conflict_penalty,
    deviation_bound,
    full_penalty,
    keep_mask,
    kept_entries,
    product_density,
    retention_mask,
    train,
)

STEPS, PRUNE_AT, DENSITY, ALPHA, BETA = 20, 7, 0.3, 0.4, 0.7
RATES = {"language": 2e-2, "connector": 2e-3}
MULTIPLIERS = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18)]
PRUNED = [f"language.{index}.{kind}" for index in range(2) for kind in ("lora_a", "lora_b")]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def factors(seed: int = 0, p: int = 7, q: int = 5, rank: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """W (p x q), A (r x q) and B (p x r)."""
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, p, q), normal(generator, rank, q), normal(generator, p, rank)


def toy(connector: str = "full") -> dict[str, Layer]:
    """A connector of two layers, a language model of two LoRA layers with B = 0, and a frozen head."""
    generator = torch.Generator().manual_seed(1)

    def lora(out: int, width: int, rank: int) -> dict[str, Any]:
        return {"lora_a": normal(generator, rank, width), "lora_b": torch.zeros(out, rank), "lora_alpha": 6.0}

    def connector_layer(out: int, width: int) -> Layer:
        weight, bias = normal(generator, out, width) / 3, normal(generator, out)
        if connector == "full":
            return Layer("connector", "full", weight, bias)
        return Layer("connector", "lora", weight, bias, **lora(out, width, 2))

    return {
        "connector.0": connector_layer(8, 6),
        "connector.1": connector_layer(10, 8),
        "language.0": Layer("language", "lora", normal(generator, 9, 10) / 3, **lora(9, 10, 3)),
        "language.1": Layer("language", "lora", normal(generator, 8, 9) / 3, **lora(8, 9, 4)),
        "head": Layer("language", "frozen", normal(generator, 5, 8)),
    }


def batches() -> list[list[Batch]]:
    """Two micro-batches a step with different numbers of supervised tokens."""
    generator = torch.Generator().manual_seed(2)
    steps = []
    for _ in range(STEPS):
        micro_batches = []
        for tokens, ignored in ((6, 1), (9, 6)):
            labels = torch.randint(5, (tokens,), generator=generator)
            labels[:ignored] = IGNORED
            micro_batches.append((normal(generator, tokens, 6), labels))
        steps.append(micro_batches)
    return steps


def run(layers: dict[str, Layer] | None = None, **changes: Any) -> list[StepRecord]:
    options: dict[str, Any] = {
        "batches": batches(),
        "learning_rates": RATES,
        "multipliers": MULTIPLIERS,
        "prune_at": PRUNE_AT,
        "density": DENSITY,
        "alpha": ALPHA,
        "beta": BETA,
        "clip": 0.5,
    }
    options.update(changes)
    return train(layers or toy(), options.pop("batches"), **options)


# The retention mask


def test_the_mask_is_the_formula_entry_by_entry() -> None:
    weight = factors()[0]
    norm = math.sqrt(sum(value**2 for value in weight.flatten().tolist()))
    for omega in (0.5, 1.0, 4.0):
        expected = [
            math.tanh(omega * abs(1 / math.log(abs(value) / norm + 1e-15)))
            for value in weight.flatten().tolist()
        ]
        assert retention_mask(weight, omega).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_the_mask_is_nearly_flat_on_a_large_matrix() -> None:
    # 4096 x 4096 Gaussian weights have norm 4096 sigma; one large entry stands in for all others.
    weight = torch.tensor([[0.1, 3.0, math.sqrt(4096**2 - 0.1**2 - 3.0**2)]], dtype=torch.float64)
    assert retention_mask(weight)[0, :2].tolist() == pytest.approx([0.094, 0.138], abs=5e-4)


def test_the_mask_at_its_edges() -> None:
    assert torch.equal(retention_mask(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.float64))
    for value in (1.0, -3.0, 1e-3, 7e5):
        single = torch.zeros(3, 2)
        single[1, 1] = value
        mask = retention_mask(single)
        assert mask[1, 1] == 1
        assert mask[0, 0] == pytest.approx(math.tanh(-1 / math.log(1e-15)), rel=1e-12)


def test_larger_weights_are_retained_more_and_their_scale_does_not_matter() -> None:
    weight = factors()[0]
    order = weight.abs().flatten().argsort()
    assert (retention_mask(weight).flatten()[order].diff() > 0).all()
    assert torch.allclose(retention_mask(weight), retention_mask(-1000 * weight), rtol=1e-10, atol=0)


# The penalties


def test_gradients_agree_with_finite_differences() -> None:
    weight, lora_a, lora_b = factors()
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: conflict_penalty(weight, a, b, 1.5), (lora_a, lora_b))
    trained = factors(seed=3)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda w: full_penalty(w, weight, 1.5), (trained,))


def test_gradients_are_the_closed_form() -> None:
    weight, lora_a, lora_b = factors()
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    value = conflict_penalty(weight, lora_a, lora_b)
    value.backward()
    with torch.no_grad():
        g = retention_mask(weight).square() * (lora_b @ lora_a)
        torch.testing.assert_close(lora_b.grad, g @ lora_a.T / value, rtol=1e-12, atol=0)
        torch.testing.assert_close(lora_a.grad, lora_b.T @ g / value, rtol=1e-12, atol=0)
        torch.testing.assert_close(value.square(), (lora_b * (g @ lora_a.T)).sum(), rtol=1e-12, atol=0)


def test_the_gradient_of_a_full_matrix_is_the_closed_form() -> None:
    weight0, weight = factors()[0], factors(seed=3)[0].requires_grad_()
    value = full_penalty(weight, weight0)
    value.backward()
    expected = retention_mask(weight0).square() * (weight.detach() - weight0) / value.detach()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_value_and_gradient_are_zero_at_zero() -> None:
    weight, lora_a, _ = factors()
    lora_a.requires_grad_()
    lora_b = torch.zeros(7, 3, dtype=torch.float64, requires_grad=True)
    trained = weight.clone().requires_grad_()
    for value in (conflict_penalty(weight, lora_a, lora_b), full_penalty(trained, weight)):
        assert value.item() == 0
        value.backward()
    for tensor in (lora_a, lora_b, trained):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_an_all_zero_weight_penalises_nothing() -> None:
    weight, lora_a, lora_b = factors()
    assert conflict_penalty(torch.zeros_like(weight), lora_a, lora_b).item() == 0


# The support


def test_ties_go_to_the_lowest_index() -> None:
    tensor = torch.tensor([[1.0, -2.0, 2.0], [0.0, -1.0, 1.0]])
    assert keep_mask(tensor, 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert keep_mask(tensor, 0.67).tolist() == [[True, True, True], [False, True, False]]
    assert keep_mask(torch.zeros(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]


@settings(deadline=None)  # other work on the machine must not fail the test
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1))
def test_the_support_is_the_first_k_of_the_order(values: list[int], density: float) -> None:
    mask = keep_mask(torch.tensor(values, dtype=torch.float64), density).tolist()
    ranks = [(-abs(value), index) for index, value in enumerate(values)]
    inside = [rank for rank, kept in zip(ranks, mask, strict=True) if kept]
    outside = [rank for rank, kept in zip(ranks, mask, strict=True) if not kept]
    assert len(inside) == kept_entries(density, len(values))
    assert not inside or not outside or max(inside) < min(outside)


@pytest.mark.parametrize(("rank", "percent"), [(16, 14.9), (32, 27.5), (64, 47.4)])
def test_expected_density_of_the_product(rank: int, percent: float) -> None:
    assert 100 * product_density(0.1, 0.1, rank) == pytest.approx(percent, abs=0.05)


def test_density_of_the_product_of_pruned_factors_keeps_to_its_expectation_and_bound() -> None:
    p, q, rank, density, trials = 128, 96, 4, 0.3, 200
    generator = torch.Generator().manual_seed(4)
    expected = product_density(density, density, rank)
    deviations = []
    for _ in range(trials):
        kept_b = keep_mask(normal(generator, p, rank), density).double()
        kept_a = keep_mask(normal(generator, rank, q), density).double()
        deviations.append(((kept_b @ kept_a) > 0).double().mean().item() - expected)
    spread = torch.tensor(deviations).std().item() / math.sqrt(trials)
    # A support of exactly k draws without replacement, which moves the mean by about 1 / (p r).
    assert abs(sum(deviations) / trials) <= 4 * spread + 1 / (p * rank)
    for deviation in (0.2, 0.25, 0.3, 0.4):
        bound = deviation_bound(deviation, p, q, rank)
        assert bound < 1
        assert sum(abs(d) >= deviation for d in deviations) / trials <= bound


# The run


@pytest.mark.parametrize("connector", ["full", "lora"])
def test_the_support_stays_put_and_the_connector_stays_dense(connector: str) -> None:
    records = run(toy(connector))
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for before in records[: PRUNE_AT - 1]:
        assert before["masks"] == {}
    masks = records[PRUNE_AT - 1]["masks"]
    assert sorted(masks) == sorted(PRUNED)
    for record in records[PRUNE_AT - 1 :]:
        for key, mask in masks.items():
            assert torch.equal(record["masks"][key], mask)
            assert int(mask.sum()) == kept_entries(DENSITY, mask.numel())
            for state in (record["weights"], record["exp_avg"], record["exp_avg_sq"]):
                assert not state[key][~mask].any()
            assert record["weights"][key][mask].all()
        for key, weight in record["weights"].items():
            if key not in masks:
                assert weight.all()


def test_the_prune_keeps_the_largest_weights_of_the_step_it_follows() -> None:
    dense, pruned = run(prune_at=None), run()
    for index in range(PRUNE_AT - 1):
        for key in dense[index]["weights"]:
            assert torch.equal(dense[index]["weights"][key], pruned[index]["weights"][key])
    before, after = dense[PRUNE_AT - 1], pruned[PRUNE_AT - 1]
    assert after["loss"] == before["loss"]
    assert after["grad_norm"] == before["grad_norm"]
    for key, mask in after["masks"].items():
        assert torch.equal(mask, keep_mask(before["weights"][key], DENSITY))
        assert torch.equal(after["weights"][key], before["weights"][key] * mask)
        assert torch.equal(after["exp_avg"][key], before["exp_avg"][key] * mask)
        assert torch.equal(after["exp_avg_sq"][key], before["exp_avg_sq"][key] * mask)
    assert after["weights"]["connector.0.weight"].equal(before["weights"]["connector.0.weight"])


@pytest.mark.parametrize("connector", ["full", "lora"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_run_agrees_with_torch_modules_and_torch_adamw(connector: str, weight_decay: float) -> None:
    """The same run once more, micro-batch by micro-batch, with torch's optimiser and torch's clipping."""
    layers = toy(connector)
    records = run(layers, weight_decay=weight_decay)
    state = {
        f"{name}.{kind}": layer.tensors()[kind].requires_grad_()
        for name, layer in layers.items()
        for kind in layer.trained()
    }
    groups = [
        {"params": [t for key, t in state.items() if key.startswith(part)], "lr": rate}
        for part, rate in RATES.items()
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay)
    masks: dict[str, Tensor] = {}
    for record, micro_batches, multiplier in zip(records, batches(), MULTIPLIERS, strict=True):
        for group, rate in zip(optimiser.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * multiplier
        optimiser.zero_grad()
        supervised = sum(int((labels != IGNORED).sum()) for _, labels in micro_batches)
        loss = 0.0
        for index, (inputs, labels) in enumerate(micro_batches):
            hidden = inputs
            for name, layer in layers.items():
                hidden = hidden if name == "connector.0" else torch.tanh(hidden)
                weight = state.get(f"{name}.weight", layer.weight)
                output = torch.nn.functional.linear(hidden, weight, state.get(f"{name}.bias", layer.bias))
                if layer.tuner == "lora":
                    lora_a, lora_b = state[f"{name}.lora_a"], state[f"{name}.lora_b"]
                    output = output + layer.lora_alpha / len(lora_a) * ((hidden @ lora_a.T) @ lora_b.T)
                hidden = output
            log_likelihood = hidden.log_softmax(-1)[labels != IGNORED, labels[labels != IGNORED]]
            part = -log_likelihood.sum() / supervised
            if index == 0:
                for name, layer in layers.items():
                    if layer.tuner == "lora":
                        share = ALPHA / 2 if name.startswith("language") else BETA / 2
                        update = state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]
                    elif layer.tuner == "full":
                        share, update = BETA / 2, state[f"{name}.weight"] - layer.weight
                    else:
                        continue
                    part = part + share * torch.linalg.matrix_norm(retention_mask(layer.weight) * update)
            part.backward()
            loss += part.item()
        for key, mask in masks.items():
            grad = state[key].grad
            assert grad is not None
            grad[~mask] = 0
        norm = torch.nn.utils.clip_grad_norm_(list(state.values()), 0.5)
        optimiser.step()
        if record["step"] == PRUNE_AT:
            for key in PRUNED:
                masks[key] = record["masks"][key]
                for tensor in (
                    state[key].data,
                    optimiser.state[state[key]]["exp_avg"],
                    optimiser.state[state[key]]["exp_avg_sq"],
                ):
                    tensor[~masks[key]] = 0
        assert record["loss"] == pytest.approx(loss, rel=1e-9)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        for key, tensor in state.items():
            # Adam divides by the root of the second moment, which magnifies rounding where gradients vanish.
            theirs = {"weight": tensor.detach(), **optimiser.state[tensor]}
            torch.testing.assert_close(record["weights"][key], theirs["weight"], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(record["exp_avg"][key], theirs["exp_avg"], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(record["exp_avg_sq"][key], theirs["exp_avg_sq"], rtol=1e-7, atol=1e-9)
    assert any(record["grad_norm"] > 0.5 for record in records[PRUNE_AT:])


def test_the_loss_is_the_weighted_sum_of_its_mean_penalties() -> None:
    layers, records = toy(), run()
    assert records[0]["language_penalty"] == records[0]["connector_penalty"] == 0
    for previous, record in itertools.pairwise(records):
        weights = previous["weights"]
        language = [
            conflict_penalty(layers[name].weight, weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]).item()
            for name in ("language.0", "language.1")
        ]
        connector = [
            full_penalty(weights[f"{name}.weight"], layers[name].weight).item()
            for name in ("connector.0", "connector.1")
        ]
        assert record["language_penalty"] == pytest.approx(sum(language) / 2, rel=1e-12)
        assert record["connector_penalty"] == pytest.approx(sum(connector) / 2, rel=1e-12)
        total = record["task_loss"] + ALPHA * sum(language) / 2 + BETA * sum(connector) / 2
        assert record["loss"] == pytest.approx(total, rel=1e-12)


def test_how_a_step_is_cut_into_micro_batches_does_not_matter() -> None:
    whole = [[(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))] for step in batches()]
    for cut, uncut in zip(run(), run(batches=whole), strict=True):
        assert cut["loss"] == pytest.approx(uncut["loss"], rel=1e-9)
        for key, weight in cut["weights"].items():
            torch.testing.assert_close(weight, uncut["weights"][key], rtol=1e-7, atol=1e-9)


def test_the_given_tensors_are_left_alone() -> None:
    layers, untouched = toy(), toy()
    run(layers)
    for name, layer in layers.items():
        for kind, tensor in layer.tensors().items():
            assert torch.equal(tensor, untouched[name].tensors()[kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_at": STEPS + 1}, "never reached"),
        ({"prune_at": 0}, "never reached"),
        ({"prune_at": 1}, "all zero"),  # the first learning rate is 0, so B has not moved yet
        ({"density": 1.0}, "prunes nothing"),
        ({"density": 0.0}, "prunes all"),
        ({"multipliers": [1.0]}, "1 multipliers for 20 steps"),
        ({"batches": [[(torch.zeros(1, 6), torch.tensor([IGNORED]))]] * STEPS}, "without a supervised"),
    ],
)
def test_a_run_that_could_not_mean_anything_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)

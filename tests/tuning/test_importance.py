"""Importance of entries, against sums over plain autograd and against values computed by hand."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel
from mmtune.run import RunOptions
from mmtune.training.loop import train
from mmtune.tuning.importance import ColumnMask, Measured, chosen, measure, support_importance
from mmtune.tuning.lora import LoraOptions
from mmtune.tuning.penalty import update_penalty
from mmtune.tuning.shards import Shards
from tests import tiny_models
from tests.training.test_checkpoint import assert_same_run, train_until
from tests.world import FROZEN, FULL, SCULPT, greatest_difference, metrics, run_options, trained


def toy() -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    tensors = {"a": nn.Parameter(torch.randn(3, 5)), "b": nn.Parameter(torch.zeros(4, 3))}
    return tensors, torch.optim.AdamW(tensors.values(), lr=0.1)


def steps(
    tensors: dict[str, nn.Parameter], optimizer: Any, importance: Any, count: range
) -> list[dict[str, Any]]:
    """Trains; what each step's values and gradients were, before it."""
    seen = []
    for step in count:
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (x @ tensors["a"].T @ tensors["b"].T - 1).square().mean().backward()
        seen.append(
            {name: (p.detach().clone(), p.grad.clone()) for name, p in tensors.items() if p.grad is not None}
        )
        importance.after_backward()
        optimizer.step()
    return seen


def bound(kind: str, seed: int = 0) -> tuple[Any, dict[str, nn.Parameter], torch.optim.AdamW]:
    tensors, optimizer = toy()
    importance = support_importance(kind, tensors)
    importance.seed = seed
    importance.bind(Shards(optimizer), tensors)
    return importance, tensors, optimizer


def test_magnitude_is_what_the_entries_are() -> None:
    importance, tensors, optimizer = bound("magnitude")
    steps(tensors, optimizer, importance, range(3))
    assert torch.equal(importance.score("a"), tensors["a"].detach().abs())
    assert importance.state() == {}


def test_movement_is_how_far_they_came() -> None:
    importance, tensors, optimizer = bound("movement")
    start = {name: p.detach().clone() for name, p in tensors.items()}
    steps(tensors, optimizer, importance, range(3))
    for name, parameter in tensors.items():
        assert torch.equal(importance.score(name), (parameter.detach() - start[name]).abs())


def test_gradient_is_the_sum_over_the_steps() -> None:
    importance, tensors, optimizer = bound("gradient")
    seen = steps(tensors, optimizer, importance, range(4))
    for name in tensors:
        expected = torch.stack([(w * g).abs() for w, g in (step[name] for step in seen)]).sum(0)
        torch.testing.assert_close(importance.score(name), expected)
    assert importance.score("b").any()


def test_random_is_drawn_from_seed_and_name() -> None:
    one, _, _ = bound("random", seed=3)
    for name, entries in (("a", 15), ("b", 12)):
        assert sorted(one.score(name).flatten().tolist()) == list(range(1, entries + 1))
        assert torch.equal(one.score(name), bound("random", seed=3)[0].score(name))
    assert not torch.equal(one.score("a"), bound("random", seed=4)[0].score("a"))


@pytest.mark.parametrize("kind", ["movement", "gradient"])
def test_a_resumed_run_scores_the_same(kind: str) -> None:
    importance, tensors, optimizer = bound(kind)
    steps(tensors, optimizer, importance, range(2))
    saved = {name: tensor.clone() for name, tensor in importance.state().items()}
    values = {name: p.detach().clone() for name, p in tensors.items()}
    moments = copy.deepcopy(optimizer.state_dict())
    assert set(saved) == {f"{importance.kept}.a", f"{importance.kept}.b"}

    others, other = toy()
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(values[name])
    other.load_state_dict(moments)
    resumed = support_importance(kind, others)
    resumed.bind(Shards(other), others)
    resumed.load_state(saved)
    steps(tensors, optimizer, importance, range(2, 4))
    steps(others, other, resumed, range(2, 4))
    for name in tensors:
        assert torch.equal(resumed.score(name), importance.score(name))


def test_forgotten_once_it_is_used() -> None:
    importance, _, _ = bound("movement")
    importance.forget()
    assert importance.state() == {}


# ---- Of the entries of W ---------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny_models.model(tmp_path)


NAME = "model.layers.1.self_attn.v_proj"


def adapted(model: VisionLanguageModel) -> Any:
    tuner = LoraOptions(lr=1e-3, rank=2, dropout=0.5, targets=[NAME]).make()
    tuner.attach(model, "language")
    return tuner


def watched(kind: str, tuner: Any) -> Measured:
    layer = tuner.layers[NAME]
    return Measured(kind, layer, layer.get_base_layer().weight)


def batches() -> list[Any]:
    return [tiny_models.batch([pictures], seed) for seed, pictures in enumerate([1, 0, 2])]


def test_activation_is_the_sum_of_squares_of_the_inputs(model: VisionLanguageModel) -> None:
    tuner = adapted(model)
    inputs: list[torch.Tensor] = []
    layer = tuner.layers[NAME].get_base_layer()
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches():
            model.eval()(batch)
    handle.remove()
    one = watched("activation", tuner)
    model.train()
    measure(model, [one], batches(), torch.float32)
    expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double().square().sum(0)
    torch.testing.assert_close(one.score, expected, rtol=1e-5, atol=0)
    assert model.training


def test_gradient_is_that_of_plain_autograd(model: VisionLanguageModel) -> None:
    tuner = adapted(model)
    weight = tuner.layers[NAME].get_base_layer().weight
    expected = torch.zeros_like(weight)
    weight.requires_grad_(True)
    model.eval()
    for batch in batches():
        weight.grad = None
        (model(batch) / (batch.labels[:, 1:] != -100).sum()).backward()
        expected += (weight.detach() * weight.grad).abs()
    weight.requires_grad_(False)
    model.zero_grad()
    one = watched("gradient", tuner)
    measure(model, [one], batches(), torch.float32)
    assert expected.count_nonzero() > expected.numel() / 2
    torch.testing.assert_close(one.score, expected, rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_a_connector_that_trains_hears_pictures_alone(model: VisionLanguageModel) -> None:
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    layer = next(m for m in model.connector.modules() if isinstance(m, nn.Linear))
    one = Measured("activation", layer, layer.weight)
    measure(model, [one], batches(), torch.float32)
    with torch.no_grad():
        seen = [model.vision(batch.images) for batch in batches() if len(batch.images)]
    expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double().square().sum(0)
    torch.testing.assert_close(one.score, expected, rtol=1e-5, atol=0)


def test_measuring_draws_no_random_number(model: VisionLanguageModel) -> None:
    tuner = adapted(model)
    model.train()
    before = torch.get_rng_state()
    measure(model, [watched("gradient", tuner)], batches(), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    handles = tuner.layers[NAME]._forward_hooks
    assert not handles


def test_samples_are_chosen_by_the_seed() -> None:
    assert chosen(1000, 0) == chosen(1000, 0) != chosen(1000, 1)
    assert len(set(chosen(1000, 0))) == 32
    assert sorted(chosen(5, 0)) == [0, 1, 2, 3, 4]


def test_a_mask_from_activations_is_the_formula() -> None:
    """Value and gradients of the penalty against plain fp64 autograd over the whole matrix."""
    torch.manual_seed(0)
    weight, columns = torch.randn(40, 30), torch.rand(30).double() * 1e6
    weight[:, 3] = 0
    columns[7] = 0
    a, b = torch.randn(4, 30), torch.randn(40, 4)
    value, grad_a, grad_b = update_penalty(ColumnMask(weight, columns, 2.0), a, b)
    a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
    scores = weight.double().abs() * columns
    mask = torch.tanh(2.0 * (1 / torch.log(scores / scores.norm() + 1e-15)).abs())
    expected = (mask * (b64 @ a64)).norm()
    expected.backward()
    assert a64.grad is not None and b64.grad is not None
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(grad_a.double(), a64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad_b.double(), b64.grad, rtol=1e-4, atol=1e-6)


# ---- Whole runs ------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"steps": 5, "micro_batch_size": 4, "checkpoint": {"every": 2, "keep": 1}}


def run(world: Path, folder: Path, name: str, kind: str, support: str, **changes: Any) -> RunOptions:
    penalty = {"kind": kind, "weight": 3.0}
    sculpt = {**SCULPT, "support": support, "prune_at": 3, "penalty": penalty, **changes}
    tune = {"vision": FROZEN, "connector": {**FULL, "penalty": penalty}, "language": sculpt}
    return run_options(world, folder, name, tune=tune, train=SHORT)


@pytest.mark.parametrize(
    ("kind", "support"), [("conflict", "movement"), ("gradient", "gradient"), ("activation", "magnitude")]
)
@pytest.mark.parametrize("stop", [3, 5], ids=["before the prune", "after it"])
def test_a_resumed_run_is_the_same_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, support: str, stop: int
) -> None:
    """Checkpoints are written after steps 2 and 4."""
    whole = run(world, tmp_path / "whole", "run", kind, support)
    train(whole)
    again = run(world, tmp_path / "again", "run", kind, support)
    train_until(again, stop, monkeypatch)
    train(again, resume=True)
    assert_same_run(again, whole)


def test_each_importance_makes_another_run(world: Path, tmp_path: Path) -> None:
    """And all keep as many entries; the penalty begins to pull where M differs, at the second step."""
    finals, first, kept = [], [], []
    for kind, support in [
        ("conflict", "magnitude"),
        ("conflict", "movement"),
        ("conflict", "gradient"),
        ("activation", "magnitude"),
        ("gradient", "magnitude"),
    ]:
        made = run(world, tmp_path, f"{kind}_{support}", kind, support)
        train(made)
        final = trained(made.folder / "final")
        finals.append(final)
        first.append(metrics(made.folder)[1]["penalty_language"])
        kept.append([int(t.count_nonzero()) for name, t in final.items() if "lora_" in name])
    assert all(greatest_difference(one, other) > 1e-5 for one, other in itertools.combinations(finals, 2))
    assert first[0] == first[1] == first[2] and len(set(first)) == 3
    assert all(counts == kept[0] for counts in kept)


def test_a_density_for_each_module(world: Path, tmp_path: Path) -> None:
    """Of several names that fit the longest counts."""
    density = {"*": 0.1, "*.self_attn.*": 0.3, "*.layers.1.self_attn.v_proj": 0.5}
    made = run(world, tmp_path, "run", "conflict", "magnitude", density=density)
    train(made)
    for name, tensor in trained(made.folder / "final").items():
        if "lora_" in name:
            expected = 0.5 if "layers.1.self_attn.v_proj" in name else 0.3 if "self_attn" in name else 0.1
            assert int(tensor.count_nonzero()) == int(expected * tensor.numel())
    rows = json.loads((made.folder / "tuning_table.json").read_text())
    assert {row["density"] for row in rows} == {None, 0.1, 0.3, 0.5}


@pytest.mark.parametrize(
    ("density", "said"),
    [
        (
            {"*.self_attn.*": 0.1},
            "no density for 6 modules that are pruned, such as model.layers.0.mlp.gate_proj",
        ),
        ({"*": 0.1, "*.q_porj": 0.2}, "'*.q_porj' is no module that is pruned"),
        ({"*": 1.5}, "expected more than 0 and less than 1, found 1.5"),
        ({}, "an empty mapping"),
    ],
)
def test_densities_that_say_too_little(world: Path, tmp_path: Path, density: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        train(run(world, tmp_path, "run", "conflict", "magnitude", density=density))
    assert said in str(raised.value)


def test_an_embedding_has_no_inputs_to_measure(world: Path, tmp_path: Path) -> None:
    tune = {"vision": {**FULL, "penalty": {"kind": "activation", "weight": 1.0}}}
    with pytest.raises(UserError, match="no linear layer"):
        train(run_options(world, tmp_path, tune=tune))


@pytest.mark.parametrize(("support", "what"), [("movement", "movement of "), ("gradient", "gradient of ")])
def test_importance_that_is_all_zero_prunes_nothing(
    world: Path, tmp_path: Path, support: str, what: str
) -> None:
    """After one step A has neither moved nor had a gradient, since B was 0."""
    with pytest.raises(UserError, match=f"the {what}.*lora_A is all zero at step 1"):
        train(run(world, tmp_path, "run", "conflict", support, prune_at=1))

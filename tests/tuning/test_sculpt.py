"""LoRASculpt: a run of the real tuner against the reference, and each promise about the support."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mmtune.core.errors import UserError
from mmtune.parts import VisionLanguageModel
from mmtune.tuning.base import PenaltyOptions
from mmtune.tuning.full import FullOptions
from mmtune.tuning.importance import drawn
from mmtune.tuning.sculpt import SculptOptions, SculptTuner, largest, support_size
from mmtune.tuning.shards import Shards
from tests import tiny_models as tiny
from tests.tuning import lorasculpt_reference as reference
from tests.tuning.lorasculpt_reference import IGNORED, Layer, kept_entries

# A run against the reference

STEPS, PRUNE_AT, DENSITY, RANK, LORA_ALPHA = 20, 7, 0.3, 3, 6.0
ALPHA, BETA, OMEGA, DECAY, CLIP = 0.4, 0.7, 1.3, 0.01, 0.29
RATES = {"language": 2e-2, "connector": 2e-3}
MULTIPLIERS = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18)]


class Stack(nn.ModuleDict):
    """Named linear layers in a row; peft asks a causal model for one method more."""

    def prepare_inputs_for_generation(self) -> None:
        raise NotImplementedError


class Toy(nn.Module):
    """A connector of two layers, a language model of two and a head, with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.connector = Stack({"0": nn.Linear(6, 8), "1": nn.Linear(8, 10)})
        self.language = Stack({"0": nn.Linear(10, 12), "1": nn.Linear(12, 9), "head": nn.Linear(9, 5)})
        self.adapters: dict[str, Any] = {}
        self.options = SimpleNamespace(connector=SimpleNamespace(weights=None))

    def part(self, name: str) -> nn.Module:
        return getattr(self, name)

    core = part

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        layers = [*self.connector.values(), *self.language.values()]
        hidden = layers[0](inputs)
        for layer in layers[1:]:
            hidden = layer(hidden.tanh())
        return nn.functional.cross_entropy(hidden, labels, ignore_index=IGNORED, reduction="sum")


def step_batches() -> list[list[tuple[Tensor, Tensor]]]:
    """Micro-batches of each step: one or two, of different sizes, some labels unsupervised."""
    generator = torch.Generator().manual_seed(2)

    def micro(tokens: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 5, (tokens,), generator=generator)
        labels[:: 3 + tokens % 2] = IGNORED
        return torch.randn(tokens, 6, generator=generator), labels

    return [[micro(5), micro(9)] if step % 2 else [micro(8)] for step in range(STEPS)]


def sculpt_options(**changes: Any) -> SculptOptions:
    given: dict[str, Any] = {"lr": 1e-2, "rank": 2, "alpha": 4, "density": 0.3, "prune_at": 2}
    return SculptOptions(**{**given, **changes})


def toy_tuners(toy: Any) -> tuple[SculptTuner, Any]:
    options = sculpt_options(
        rank=RANK,
        alpha=LORA_ALPHA,
        targets=["0", "1"],
        density=DENSITY,
        prune_at=PRUNE_AT,
        penalty=PenaltyOptions(ALPHA, omega=OMEGA),
    )
    sculpt = options.make()
    full = FullOptions(lr=2e-3, penalty=PenaltyOptions(BETA, omega=OMEGA)).make()
    full.attach(toy, "connector")
    sculpt.attach(toy, "language")
    sculpt.start(STEPS, seed=0)
    return sculpt, full


def reference_layers(toy: Any, sculpt: SculptTuner) -> dict[str, Layer]:
    layers = {}
    for name, linear in toy.connector.items():
        layers[f"connector.{name}"] = Layer("connector", "full", linear.weight, linear.bias)
    for name in ("0", "1"):
        base = sculpt.layers[name].get_base_layer()
        pair = sculpt.pair(name)
        layers[f"language.{name}"] = Layer("language", "lora", base.weight, base.bias, *pair, LORA_ALPHA)
    head = toy.language["head"]
    layers["language.head"] = Layer("language", "frozen", head.weight, head.bias)
    return layers


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=["fp64", "fp32"]
)
def test_a_run_equals_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Weights, both moments and the support after each of 20 steps of torch's own AdamW and clipping."""
    toy = Toy()
    sculpt, full = toy_tuners(toy)
    toy.to(dtype)  # the tuners' fp32 is exact in fp64
    batches = step_batches()
    records = reference.train(
        reference_layers(toy, sculpt),
        batches,
        learning_rates=RATES,
        multipliers=MULTIPLIERS,
        prune_at=PRUNE_AT,
        density=DENSITY,
        alpha=ALPHA,
        beta=BETA,
        omega=OMEGA,
        weight_decay=DECAY,
        clip=CLIP,
    )
    assert any(record["grad_norm"] > CLIP for record in records[PRUNE_AT:])
    assert any(record["grad_norm"] < CLIP for record in records)

    tensors = {f"connector.{name}": p for name, p in toy.connector.named_parameters()}
    tensors |= {f"language.{name}".lower(): p for name, p in sculpt._tensors()}
    groups = [
        {"params": [p for p in toy.part(part).parameters() if p.requires_grad], "name": part}
        for part in RATES
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=DECAY)
    for tuner in (sculpt, full):
        tuner.bind(Shards(optimizer))
    for step, (micros, record) in enumerate(zip(batches, records, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = RATES[group["name"]] * MULTIPLIERS[step]
        supervised = sum(int((labels != IGNORED).sum()) for _, labels in micros)
        task = 0.0
        for i, (inputs, labels) in enumerate(micros):
            loss = toy(inputs.to(dtype), labels) / supervised
            task += loss.item()
            if i == len(micros) - 1:
                penalties = [p for tuner in (sculpt, full) if (p := tuner.before_backward()) is not None]
            loss.backward()
        for tuner in (sculpt, full):
            tuner.after_backward()
        assert task == pytest.approx(record["task_loss"], rel=tolerance)
        assert penalties[0].item() == pytest.approx(ALPHA * record["language_penalty"], rel=tolerance)
        assert penalties[1].item() == pytest.approx(
            BETA * record["connector_penalty"], rel=tolerance, abs=tolerance
        )
        norm = nn.utils.clip_grad_norm_([p for p in toy.parameters() if p.requires_grad], CLIP)
        assert norm.item() == pytest.approx(record["grad_norm"], rel=tolerance)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sculpt.after_step(step + 1)

        assert tensors.keys() == record["weights"].keys()
        for key, parameter in tensors.items():
            for found, expected in (
                (parameter, record["weights"][key]),
                (optimizer.state[parameter]["exp_avg"], record["exp_avg"][key]),
                (optimizer.state[parameter]["exp_avg_sq"], record["exp_avg_sq"][key]),
            ):
                scale = float(expected.abs().max())
                torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=tolerance * scale)
            mask = record["masks"].get(key)
            if mask is not None:
                assert torch.equal(sculpt.masks[_peft_name(key)], mask)
                assert not parameter.detach()[~mask].any()
                assert not optimizer.state[parameter]["exp_avg"][~mask].any()
                assert not optimizer.state[parameter]["exp_avg_sq"][~mask].any()
    assert len(sculpt.masks) == 4
    sculpt.finish()


def _peft_name(key: str) -> str:
    """language.0.lora_a -> 0.lora_A"""
    return key.removeprefix("language.").replace("lora_a", "lora_A").replace("lora_b", "lora_B")


# The support


def test_ties_go_to_the_lowest_index() -> None:
    assert largest(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [True, True, False, False]
    assert largest(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 0.5).tolist() == [[True, True], [False, False]]


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=300),
    density=st.floats(0.01, 0.99),
    scale=st.sampled_from([1.0, 1e-30, 0.1]),
)
def test_the_support_is_the_references(values: list[int], density: float, scale: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32) * scale
    found = largest(tensor, density)
    assert int(found.sum()) == kept_entries(density, len(values))
    assert torch.equal(found, reference.keep_mask(tensor, density))


@pytest.mark.parametrize(
    ("entries", "density", "size"),
    [(100, 0.29, 29), (11000, 0.7, 7700), (10, 0.99, 9), (2_000_000, 1e-5, 20)],
)
def test_the_size_of_the_support_is_exact(entries: int, density: float, size: int) -> None:
    assert support_size(entries, density) == kept_entries(density, entries) == size


# On a real model


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny.model(tmp_path / "parts")


def attached(model: VisionLanguageModel, **changes: Any) -> tuple[SculptTuner, torch.optim.AdamW]:
    model.vision.requires_grad_(False)
    model.connector.requires_grad_(False)
    tuner = sculpt_options(**changes).make()
    tuner.attach(model, "language")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner.bind(Shards(optimizer))
    return tuner, optimizer


def advance(model: VisionLanguageModel, tuner: SculptTuner, optimizer: Any, steps: range) -> None:
    """Steps numbered from 1."""
    for step in steps:
        for seed in (step, step + 100):
            model(tiny.batch([1, 0, 2], seed=seed)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tuner.after_step(step)


def test_exactly_k_entries_from_the_prune_on(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model, density=0.29)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 2))
    assert tuner.densities() == {} and tuner.masks == {}
    advance(model, tuner, optimizer, range(2, 3))
    supports = {name: p.detach() != 0 for name, p in tuner._tensors()}
    for support in supports.values():
        assert int(support.sum()) == kept_entries(0.29, support.numel())
    moved = {name: p.detach().clone() for name, p in tuner._tensors()}
    advance(model, tuner, optimizer, range(3, 7))
    for name, parameter in tuner._tensors():
        assert not parameter.detach()[~supports[name]].any()
        assert (parameter.detach() != moved[name])[supports[name]].any()
    tuner.finish()


def test_the_prune_changes_nothing_on_the_support(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model, prune_at=3)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 3))
    tuner.prune_step = 0
    advance(model, tuner, optimizer, range(3, 4))
    before = {
        name: [p.detach().clone(), *(optimizer.state[p][m].clone() for m in ("exp_avg", "exp_avg_sq"))]
        for name, p in tuner._tensors()
    }
    tuner.prune_step = 3
    tuner.after_step(3)
    for name, p in tuner._tensors():
        after = [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
        for old, new in zip(before[name], after, strict=True):
            assert torch.equal(new, old * tuner.masks[name]) and old[~tuner.masks[name]].any()
        assert torch.equal(tuner.masks[name], reference.keep_mask(before[name][0], 0.3))


def test_gradients_are_zero_outside_before_clipping(model: VisionLanguageModel) -> None:
    """And add up inside over the micro-batches as they would without the hook."""
    tuner, optimizer = attached(model)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 3))
    parameters = dict(tuner._tensors())
    batches = [tiny.batch([1, 0, 2], seed=seed) for seed in (50, 51)]
    expected = torch.autograd.grad(sum(model(batch) for batch in batches), list(parameters.values()))
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch).backward()
    for (name, parameter), whole in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None
        assert not parameter.grad[~tuner.masks[name]].any()
        inside = tuner.masks[name]
        torch.testing.assert_close(parameter.grad[inside], whole[inside], rtol=1e-3, atol=1e-4)
    norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    held = [p.grad for p in parameters.values() if p.grad is not None]
    assert norm > 1 and torch.stack([g.norm() for g in held]).norm().item() == pytest.approx(1, rel=1e-4)


def test_a_random_support_is_drawn_from_seed_and_name(model: VisionLanguageModel) -> None:
    """Reproducible, of the right size, another for each seed and tensor, and held to the end."""
    tuner, optimizer = attached(model, density=0.29, support="random")
    tuner.start(6, seed=3)
    advance(model, tuner, optimizer, range(1, 2))
    state = torch.get_rng_state()
    tuner.after_step(2)
    assert torch.equal(torch.get_rng_state(), state)
    advance(model, tuner, optimizer, range(3, 7))
    tuner.finish()
    for name, parameter in tuner._tensors():
        mask = tuner.masks[name]
        assert int(mask.sum()) == kept_entries(0.29, mask.numel())
        assert not parameter.detach()[~mask].any()
        for seed, same in ((f"3/{name}", True), (f"4/{name}", False), (f"3/{name}x", False)):
            assert torch.equal(largest(drawn(parameter.shape, seed), 0.29), mask) == same


def test_a_random_support_is_uniform() -> None:
    """Over many draws each entry stays as often as any other."""
    shape = torch.Size((5, 8))
    counts = sum(largest(drawn(shape, str(seed)), 0.3).double() for seed in range(2000))
    assert isinstance(counts, torch.Tensor)
    # Binomial: mean 600, SD 20.5; forty entries within 4.5 SD.
    assert (counts - 600).abs().max() < 92 and counts.std() > 5


def test_densities_next_to_what_independence_predicts(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model, density=0.5)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 3))
    found = tuner.densities()
    assert found["density_a"] == pytest.approx(0.5) and found["density_b"] == pytest.approx(0.5)
    assert found["density_ba_expected"] == pytest.approx(reference.product_density(0.5, 0.5, 2))
    pairs = [tuner.pair(name) for name in tuner.layers]
    counted = [((b != 0).double() @ (a != 0).double() > 0).double().mean().item() for a, b in pairs]
    assert found["density_ba"] == pytest.approx(sum(counted) / len(counted))


def test_an_all_zero_tensor_is_not_pruned(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model, prune_at=1)
    tuner.start(6, seed=0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(UserError, match=r"lora_B is all zero at step 1"):
        advance(model, tuner, optimizer, range(1, 2))


@pytest.mark.parametrize(
    ("prune_at", "steps", "expected"), [(2, 3, 2), (1, 2, 1), (0.1, 25, 3), (0.5, 10, 5), (0.01, 10, 1)]
)
def test_the_prune_step(model: VisionLanguageModel, prune_at: float, steps: int, expected: int) -> None:
    tuner, _ = attached(model, prune_at=prune_at)
    tuner.start(steps, seed=0)
    assert tuner.prune_step == expected


@pytest.mark.parametrize(("prune_at", "steps"), [(100, 100), (100, 7), (0.1, 1), (0.9, 5)])
def test_an_unreachable_prune_step(model: VisionLanguageModel, prune_at: float, steps: int) -> None:
    tuner, _ = attached(model, prune_at=prune_at)
    with pytest.raises(UserError, match=f"the run ends after {steps}"):
        tuner.start(steps, seed=0)


def test_a_run_in_which_nothing_was_pruned(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model, prune_at=5)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 3))
    with pytest.raises(RuntimeError, match="nothing was pruned"):
        tuner.finish()


def test_an_entry_that_came_back_is_noticed(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 3))
    name, parameter = tuner._tensors()[0]
    with torch.no_grad():
        parameter[~tuner.masks[name]] = 1e-9
    with pytest.raises(RuntimeError, match="outside its support"):
        tuner.finish()


def test_a_density_that_keeps_nothing(model: VisionLanguageModel) -> None:
    with pytest.raises(UserError, match=r"density 0\.001 keeps no entry of .*lora_A"):
        attached(model, density=0.001)


@pytest.mark.parametrize("part", ["connector", "vision"])
def test_only_the_language_model_is_pruned(model: VisionLanguageModel, part: str) -> None:
    with pytest.raises(UserError, match=f"the {part} is regularised, never pruned"):
        sculpt_options().make().attach(model, part)
    assert not model.adapters


def test_state_goes_on_where_it_stopped(model: VisionLanguageModel, tmp_path: Path) -> None:
    tuner, optimizer = attached(model)
    assert tuner.state() == {}
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 4))
    saved = {name: tensor.clone() for name, tensor in tuner.state().items()}
    weights, moments = model.state_dict(), deepcopy(optimizer.state_dict())

    other = tiny.model(tmp_path / "again")
    resumed, its_optimizer = attached(other)
    resumed.start(6, seed=0)
    other.load_state_dict(weights)
    its_optimizer.load_state_dict(moments)
    resumed.load_state(saved)
    for each, mine, its in ((model, tuner, optimizer), (other, resumed, its_optimizer)):
        advance(each, mine, its, range(4, 7))
        mine.finish()
    assert resumed.densities() == tuner.densities()
    for (name, expected), (_, found) in zip(tuner._tensors(), resumed._tensors(), strict=True):
        assert torch.equal(tuner.masks[name], resumed.masks[name])
        torch.testing.assert_close(found, expected)


def test_state_before_the_prune_holds_no_mask(model: VisionLanguageModel) -> None:
    tuner, optimizer = attached(model)
    tuner.load_state({})
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 4))
    tuner.finish()


def test_the_saved_adapter_is_sparse(model: VisionLanguageModel, tmp_path: Path) -> None:
    """In the file, by its own tensor names, and as peft loads it."""
    tuner, optimizer = attached(model)
    tuner.start(6, seed=0)
    advance(model, tuner, optimizer, range(1, 6))
    model.eval().save_pretrained(tmp_path / "final")
    folder = tmp_path / "final/adapter/language"
    in_file = load_file(folder / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.weight": mask for name, mask in tuner.masks.items()}
    assert in_file.keys() == expected.keys()
    for name, tensor in in_file.items():
        assert not tensor[~expected[name]].any()
        assert int(tensor.count_nonzero()) == kept_entries(0.3, tensor.numel())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "parts/lm")
    loaded = PeftModel.from_pretrained(plain, str(folder)).state_dict()
    for name, parameter in tuner._tensors():
        assert torch.equal(loaded[f"base_model.model.{name}.default.weight"], parameter)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.0}, "density"),
        ({"prune_at": 0}, "prune_at"),
        ({"prune_at": 1.5}, "prune_at"),
        ({"rank": 0}, "rank"),
        ({"targets": []}, "targets"),
    ],
)
def test_faulty_options(changes: dict[str, Any], key: str) -> None:
    found: list[str] = []
    sculpt_options(**changes).check(lambda where, *_: found.append(where))
    assert found == [key]
    sculpt_options().check(lambda *fault: pytest.fail(str(fault)))

"""Training runs of a few steps, against loops written here and against what the files must say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.batches import Batch, batch_order, collate, encode_samples
from mmtune.data.chat import IGNORE
from mmtune.data.samples import read_llava
from mmtune.parts import VisionLanguageModel
from mmtune.run import RunOptions
from mmtune.training import loop
from mmtune.training.loop import train
from mmtune.tuning.full import FullTuner
from mmtune.tuning.sculpt import SculptTuner
from mmtune.tuning.shards import Shards
from tests.world import (
    FROZEN,
    FULL,
    LORA,
    PENALTY,
    SCULPT,
    greatest_difference,
    metrics,
    run_file,
    run_options,
    trained,
)

PLAIN = {"vision": FROZEN, "connector": FULL, "language": LORA}
PENALISED = {
    "vision": FROZEN,
    "connector": {**FULL, "penalty": PENALTY},
    "language": {**SCULPT, "penalty": {**PENALTY, "weight": 0.5, "omega": 1.5}},
}
SUPERVISED = Callable[[VisionLanguageModel, Batch], torch.Tensor]


def first_batches(options: RunOptions, model: VisionLanguageModel, count: int) -> list[Batch]:
    """The whole batches of the first `count` optimiser steps, however the run splits them."""
    stage = options.all_stages()[0]
    (data,) = stage.data
    samples = read_llava(data.file(), data.images())
    examples, _ = encode_samples(samples, model.chat, stage.train.max_length)
    order = batch_order(examples, stage.train.batch_size, options.seed, epoch=0)[:count]
    pad_id = model.language.pad_id
    return [collate([examples[i] for i in batch], model.transform, pad_id) for batch in order]


def mean_loss(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """By transformers' own forward pass, over all positions, labels shifted there."""
    assert batch.labels is not None
    made = model.language.hf(inputs_embeds=model.splice(batch), attention_mask=batch.attention_mask)
    flat = made.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, batch.labels[:, 1:].flatten(), ignore_index=IGNORE)


@pytest.fixture(scope="module")
def penalised(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    """A LoRASculpt run of 4 steps with both penalties, pruned after 2, in micro-batches of 4."""
    folder = tmp_path_factory.mktemp("penalised")
    train_options = {"steps": 4, "micro_batch_size": 4, "schedule": "cosine", "warmup": 0.25}
    options = run_options(world, folder, tune=PENALISED, train=train_options)
    train(options)
    return options


# ---- What is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [PLAIN, PENALISED], ids=["plain", "penalised"])
def test_micro_batches_change_nothing(world: Path, tmp_path: Path, tune: dict[str, Any]) -> None:
    """Rows have from 1 to about 20 supervised tokens, so a mean of means would show; and a penalty that
    counted with every micro-batch would weigh four times as much."""
    found = {}
    for micro in (8, 2):
        options = run_options(world, tmp_path, f"micro{micro}", tune=tune, train={"micro_batch_size": micro})
        found[micro] = trained(train(options)), metrics(options.folder)
    assert greatest_difference(found[8][0], found[2][0]) < 1e-6
    connector = {name: t for name, t in found[8][0].items() if name.startswith("connector/")}
    before = {name: t for name, t in trained(world / "base").items() if name in connector}
    assert greatest_difference(connector, before) > 1e-4
    for whole, split in zip(found[8][1], found[2][1], strict=True):
        for key in whole.keys() - {"samples_per_s", "tokens_per_s"}:
            assert split[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-7), key


def test_a_plain_loop_comes_to_the_same(world: Path, tmp_path: Path) -> None:
    rates = {"vision": 1e-4, "connector": 2e-4, "language": 5e-4}
    options = run_options(
        world,
        tmp_path,
        tune={part: {"tuner": "full", "lr": rate} for part, rate in rates.items()},
        train={"steps": 5, "micro_batch_size": 4, "schedule": "cosine", "clip": 0.5, "weight_decay": 0.1},
    )
    tuned = VisionLanguageModel.from_pretrained(train(options))

    model = VisionLanguageModel.from_pretrained(world / "base").train()
    groups = [{"params": list(model.part(part).parameters())} for part in rates]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    losses = []
    for step, batch in enumerate(first_batches(options, model, 5)):
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / 5)) / 2
        loss = mean_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    assert [line["loss"] for line in metrics(options.folder)] == pytest.approx(losses, rel=1e-6)
    assert greatest_difference(tuned.state_dict(), model.state_dict()) < 1e-5
    untouched = VisionLanguageModel.from_pretrained(world / "base")
    assert greatest_difference(tuned.state_dict(), untouched.state_dict()) > 1e-3


def test_activation_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    found = {}
    for on in (False, True):
        tune = {**PENALISED, "vision": FULL, "language": {**SCULPT, "dropout": 0.1}}
        options = run_options(
            world, tmp_path, f"checkpointing_{on}", tune=tune, train={"activation_checkpointing": on}
        )
        found[on] = trained(train(options)), [line["loss"] for line in metrics(options.folder)]
    assert found[True][1] == found[False][1]
    assert greatest_difference(found[True][0], found[False][0]) == 0


def test_activation_checkpointing_is_switched_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def look(model: VisionLanguageModel, *_: Any) -> None:
        seen["on"] = [model.core(part).is_gradient_checkpointing for part in ("vision", "language")]

    monkeypatch.setattr(loop, "save_model", look)
    train(run_options(world, tmp_path, train={"steps": 1, "activation_checkpointing": True}))
    assert seen["on"] == [True, True]


def test_the_norms_of_task_and_penalty_are_those_of_autograd(world: Path, tmp_path: Path) -> None:
    """Of step 2, from the weights that a run of one step ends with; at step 1 both penalties are 0."""
    tune = {**PENALISED, "language": {**PENALISED["language"], "tuner": "lora"}}
    for key in ("density", "prune_at"):
        tune["language"].pop(key)
    one = run_options(world, tmp_path, "one", tune=tune, train={"steps": 1})
    two = run_options(world, tmp_path, "two", tune=tune, train={"steps": 2, "micro_batch_size": 2})
    model = VisionLanguageModel.from_pretrained(train(one)).train()
    train(two)
    logged = metrics(two.folder)[1]

    base = VisionLanguageModel.from_pretrained(world / "base")
    model.requires_grad_(False)
    terms: dict[str, list[torch.Tensor]] = {"connector": [], "language": []}
    regularised = []
    for name, weight in model.connector.named_parameters():
        if weight.ndim == 2:
            regularised.append(weight.requires_grad_())
            initial = base.connector.get_parameter(name)
            terms["connector"].append((retention(initial, 1.0) * (weight - initial)).norm())
    for layer in model.language.modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index,union-attr]
            regularised += [a.requires_grad_(), b.requires_grad_()]
            terms["language"].append((retention(layer.get_base_layer().weight, 1.5) * (b @ a)).norm())  # type: ignore[operator]
    penalties = {
        part: weight * torch.stack(terms[part]).mean()
        for part, weight in (("connector", 1.0), ("language", 0.5))
    }
    of_penalty = torch.autograd.grad(sum(penalties.values()), regularised)  # type: ignore[arg-type]
    of_task = torch.autograd.grad(mean_loss(model, first_batches(two, model, 2)[1]), regularised)

    assert logged["penalty_connector"] == pytest.approx(penalties["connector"].item(), rel=1e-4)
    assert logged["penalty_language"] == pytest.approx(penalties["language"].item(), rel=1e-4)
    assert logged["penalty_grad_norm"] == pytest.approx(norm(of_penalty), rel=1e-4)
    assert logged["task_grad_norm"] == pytest.approx(norm(of_task), rel=1e-4)
    assert logged["penalty_grad_norm"] > 0.01


@pytest.mark.parametrize("part", ["connector", "language"])
@pytest.mark.parametrize("kind", ["conflict", "constant"])
def test_each_penalty_can_stand_alone(world: Path, tmp_path: Path, part: str, kind: str) -> None:
    """Without pruning, and without one on the other part; it pulls on what it falls on."""
    penalty = {"kind": kind, "weight": 3.0}
    options = run_options(world, tmp_path, tune={**PLAIN, part: {**PLAIN[part], "penalty": penalty}})
    train(options)
    plain = run_options(world, tmp_path, "plain")
    train(plain)
    lines, without = metrics(options.folder), metrics(plain.folder)
    assert [{key for key in line if key.startswith("penalty_")} for line in lines] == [
        {f"penalty_{part}", "penalty_grad_norm", "penalty_grad_ratio"}
    ] * 3
    assert lines[0]["loss"] == without[0]["loss"] and lines[-1]["grad_norm"] != without[-1]["grad_norm"]


def retention(weight: torch.Tensor, omega: float) -> torch.Tensor:
    return torch.tanh(omega * (1 / torch.log(weight.abs() / weight.norm() + 1e-15)).abs()).detach()


def norm(tensors: tuple[torch.Tensor, ...]) -> float:
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors))


# ---- What is left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_is_bit_identical_trained_is_fp32_pruned_is_zero(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    kept: list[tuple[VisionLanguageModel, dict[str, Any]]] = []
    tuners: dict[str, Any] = {}
    save, attach = loop.save_model, loop._attach

    def keep(model: VisionLanguageModel, shards: Shards, folder: Path, state: dict[str, Any]) -> None:
        kept.append((model, state))
        save(model, shards, folder, state)

    def remember(model: VisionLanguageModel, made: dict[str, Any], *more: Any) -> Any:
        tuners.update(made)
        return attach(model, made, *more)

    monkeypatch.setattr(loop, "save_model", keep)
    monkeypatch.setattr(loop, "_attach", remember)
    options = run_options(
        world, tmp_path, tune=PENALISED, model={"base": str(world / "base"), "dtype": dtype}
    )
    final = train(options)
    ((model, _),) = kept

    base = VisionLanguageModel.from_pretrained(world / "base", dtype=dtype).state_dict()
    changed = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else getattr(torch, dtype)), name
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name.replace(".base_layer.", ".")]), name
        elif "lora_" not in name:
            changed += not torch.equal(parameter, base[name].float())
    assert changed == 4  # two weights and two biases of the connector

    sculpt = tuners["language"]
    assert isinstance(sculpt, SculptTuner)
    for name, parameter in sculpt._tensors():
        assert not parameter[~sculpt.masks[name]].any()
    for name, tensor in load_file(final / "adapter/language/adapter_model.safetensors").items():
        assert tensor.dtype == torch.float32
        assert int(tensor.count_nonzero()) == math.floor(0.1 * tensor.numel()), name


def test_the_sparse_adapter_is_a_plain_peft_adapter(world: Path, penalised: RunOptions) -> None:
    final = penalised.folder / "final"
    stored = load_file(final / "adapter/language/adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7  # A and B of seven projections in two layers
    for name, tensor in stored.items():
        assert int(tensor.count_nonzero()) == math.floor(0.1 * tensor.numel()), name

    batch = first_batches(penalised, VisionLanguageModel.from_pretrained(world / "base"), 1)[0]
    ours = VisionLanguageModel.from_pretrained(final)
    language = AutoModelForCausalLM.from_pretrained(world / "base" / "language")
    plain = PeftModel.from_pretrained(language, str(final / "adapter" / "language")).eval()
    ids, mask = batch.input_ids.clamp_min(0), batch.attention_mask
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        found = ours.language.hf(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, expected)
        with plain.disable_adapter():
            without = plain(input_ids=ids, attention_mask=mask).logits
    assert (expected - without).abs().max() > 1e-4


# ---- What is written ------------------------------------------------------------------------------------


def test_each_line_of_metrics_says_what_happened(penalised: RunOptions) -> None:
    lines = metrics(penalised.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    always = {"step", "stage", "loss", "grad_norm", "lr_connector", "lr_language", "samples_per_s"}
    always |= {"tokens_per_s", "penalty_connector", "penalty_language", "penalty_grad_norm", "task_grad_norm"}
    always |= {"penalty_grad_ratio", "update_norm_language", "update_norm_max_language"}
    densities = {"density_a", "density_b"} | {
        f"density_ba{what}" for what in ("", "_expected", "_bound", "_outside")
    }
    assert lines[0].keys() == always
    assert [line.keys() & densities for line in lines] == [set(), densities, densities, densities]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    # Both penalties are exactly 0 before anything has moved; not so afterwards.
    assert lines[0]["penalty_connector"] == lines[0]["penalty_language"] == 0
    assert min(lines[1]["penalty_connector"], lines[1]["penalty_language"]) > 0
    # k = floor(0.1 numel) of each tensor is a little below 0.1.
    assert 0.09 < lines[-1]["density_a"] <= 0.1
    assert 0.09 < lines[-1]["density_b"] <= 0.1
    assert lines[-1]["density_ba_outside"] == 0
    last = lines[-1]
    assert last["penalty_grad_ratio"] == last["penalty_grad_norm"] / last["task_grad_norm"]
    adapter = load_file(penalised.folder / "final/adapter/language/adapter_model.safetensors")
    norms = [
        (2 * adapter[key.replace("lora_A", "lora_B")].double() @ adapter[key].double()).norm()  # alpha / r
        for key in adapter
        if "lora_A" in key
    ]
    assert last["update_norm_language"] == pytest.approx(norm(tuple(norms)), rel=1e-5)
    assert last["update_norm_max_language"] == pytest.approx(float(max(norms)), rel=1e-5)
    assert all(line["samples_per_s"] > 0 and line["tokens_per_s"] > 0 for line in lines)


def test_each_part_has_its_own_learning_rate(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, penalised: RunOptions
) -> None:
    # Warm-up over one of four steps: half, then full, then down the cosine.
    factors = [0.5, 1.0, 0.75, 0.25]
    for name, rate in (("connector", 2e-4), ("language", 1e-3)):
        logged = [line[f"lr_{name}"] for line in metrics(penalised.folder)]
        assert logged == pytest.approx([rate * factor for factor in factors])

    made: list[torch.optim.Optimizer] = []
    make = loop.make_optimizer

    def remember(*arguments: Any) -> torch.optim.AdamW:
        optimizer = make(*arguments)
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", remember)
    train(run_options(world, tmp_path, train={"steps": 1}))
    assert {group["name"]: group["lr"] for group in made[0].param_groups} == {
        "connector": FULL["lr"],
        "language": LORA["lr"],
    }


def test_the_tuning_table_names_every_module(world: Path, penalised: RunOptions) -> None:
    rows = json.loads((penalised.folder / "tuning_table.json").read_text())
    by_part = {part: [row for row in rows if row["part"] == part] for part in PENALISED}
    base = VisionLanguageModel.from_pretrained(world / "base")
    for part, mine in by_part.items():
        whole = sum(p.numel() for p in base.part(part).parameters())
        adapters = sum(row["trained"] for row in mine if row["tuner"] == "lorasculpt")
        assert sum(row["parameters"] for row in mine) == whole + adapters
    assert {row["tuner"] for row in by_part["vision"]} == {"frozen"}
    assert sum(row["trained"] for row in by_part["vision"]) == 0
    assert {(row["tuner"], row["lr"], row["pruned"]) for row in by_part["connector"]} == {
        ("full", 2e-4, False)
    }
    pruned = [row for row in by_part["language"] if row["pruned"]]
    assert len(pruned) == 14
    assert all(row["lr"] == 1e-3 and row["regularised"] and row["trained"] for row in pruned)
    assert all(row["density"] == 0.1 for row in pruned)
    language = dict(base.core("language").named_parameters())
    for row in pruned:
        mask = retention(language[f"{row['module']}.weight"].double(), 1.5)
        assert row["mask_contrast"] == pytest.approx(float(mask.std(correction=0) / mask.mean()), rel=1e-4)
    assert not any(row["trained"] for row in by_part["language"] if not row["pruned"])


def test_the_longest_batch_comes_first(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forward = VisionLanguageModel.forward

    def look(self: VisionLanguageModel, batch: Batch) -> Any:
        widths.append(batch.input_ids.shape[1])
        return forward(self, batch)

    monkeypatch.setattr(VisionLanguageModel, "forward", look)
    train(run_options(world, tmp_path, train={"steps": None, "epochs": 1}))
    assert len(widths) == math.ceil(samples(world) / 8)
    assert widths[0] == max(widths) > min(widths)


def samples(world: Path) -> int:
    return len(json.loads((world / "datasets/tiny/train_instructions.json").read_text()))


def test_epochs_give_steps_and_the_last_step_is_logged(world: Path, tmp_path: Path) -> None:
    options = run_options(world, tmp_path, train={"steps": None, "epochs": 1.5, "log_every": 4})
    train(options)
    steps = round(1.5 * math.ceil(samples(world) / 8))
    logged = [line["step"] for line in metrics(options.folder)]
    assert logged == sorted({1, *range(4, steps, 4), steps})


# ---- Stages ---------------------------------------------------------------------------------------------


def test_stages_go_on_from_one_another(world: Path, tmp_path: Path) -> None:
    single = run_options(world, tmp_path, "single")
    block: dict[str, Any] = {
        "data": to_plain(single),
        "tune": PLAIN,
        "train": {"steps": 2, "batch_size": 8, "log_every": 1},
    }
    second = {**block, "name": "more", "tune": {**PLAIN, "connector": FROZEN}}
    options = run_options(world, tmp_path, "staged", stages=[{**block, "name": "first"}, second])
    final = train(options)

    lines = metrics(options.folder)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert {row["stage"] for row in json.loads((options.folder / "tuning_table.json").read_text())} == {1, 2}
    assert json.loads((final / "trained.json").read_text())["step"] == 4

    # By hand: the first stage as a run of its own, and the second from its model.
    one = run_options(world, tmp_path, "one", train={**block["train"], "schedule": "cosine", "warmup": 0.03})
    middle = train(one)
    assert greatest_difference(trained(options.folder / "stage-1"), trained(middle)) == 0
    two = run_options(
        world, tmp_path, "two", model={"base": str(middle)}, tune=second["tune"],
        train={**block["train"], "schedule": "cosine", "warmup": 0.03},
    )  # fmt: skip
    assert greatest_difference(trained(final), trained(train(two))) == 0
    expected = [line["loss"] for run in (one, two) for line in metrics(run.folder)]
    assert [line["loss"] for line in lines] == expected


def test_a_stage_may_have_another_chat_format(world: Path, tmp_path: Path) -> None:
    options = run_options(world, tmp_path, "align", chat="plain", tune={**PLAIN, "language": FROZEN})
    final = train(options)
    assert json.loads((final / "config.json").read_text())["language"]["chat"] == "template"

    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    described = json.loads((base / "config.json").read_text())
    described["language"]["chat"] = "plain"
    (base / "config.json").write_text(json.dumps(described))
    of_the_model = run_options(
        world, tmp_path, "model", model={"base": str(base)}, tune={**PLAIN, "language": FROZEN}
    )
    assert greatest_difference(trained(final), trained(train(of_the_model))) == 0
    assert metrics(options.folder)[0]["loss"] == metrics(of_the_model.folder)[0]["loss"]


def to_plain(options: RunOptions) -> list[dict[str, str]]:
    return [{"path": str(d.path), "image_root": str(d.image_root)} for d in options.data or []]


# ---- What goes wrong ------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_the_samples(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = VisionLanguageModel.from_pretrained(world / "base")
    for parameter in base.connector.parameters():
        parameter.data.fill_(float("nan"))
    base.save_part("connector", tmp_path / "broken")
    model = {
        "base": str(world / "base"),
        "connector": {"kind": "mlp2x_gelu", "weights": f"{tmp_path}/broken"},
    }
    path = run_file(world, tmp_path, model=model)
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "the loss is nan at step 1; the samples were train_0" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "final").exists()


def test_a_gradient_that_is_no_number_stops_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: VisionLanguageModel, batch: Batch) -> torch.Tensor:
        weight = next(p for p in self.connector.parameters())
        return (weight * 0).abs().sum().sqrt() + 1  # finite, with a gradient of 0 / 0

    monkeypatch.setattr(VisionLanguageModel, "forward", forward)
    options = run_options(world, tmp_path)
    with pytest.raises(UserError, match="gradient's norm is nan at step 1; the samples were"):
        train(options)
    assert not (options.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_penalty_that_is_no_number_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(FullTuner, "before_backward", lambda self, keep: torch.tensor(value))
    with pytest.raises(UserError, match=f"the penalty on the connector is {value} at step 1; the samples"):
        train(run_options(world, tmp_path))


def test_the_last_good_checkpoint_stays(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the second of four micro-batches of step 6 is spoilt."""
    short = {"steps": 8, "micro_batch_size": 2, "checkpoint": {"every": 3, "keep": 1}}
    options = run_options(world, tmp_path, train=short)
    whole = run_options(world, tmp_path, "whole", train=short)
    train(whole)
    forward = VisionLanguageModel.forward
    seen: list[Batch] = []

    def spoil(self: VisionLanguageModel, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        loss = forward(self, batch)
        assert isinstance(loss, torch.Tensor)
        return loss * math.nan if len(seen) == 4 * 5 + 2 else loss

    for resume in (False, True):
        seen[:] = seen[:12] if resume else []  # it goes on after step 3
        with monkeypatch.context() as patched, pytest.raises(UserError) as caught:
            patched.setattr(VisionLanguageModel, "forward", spoil)
            train(options, resume=resume)
        (fault,) = caught.value.faults
        ids = ", ".join(seen[21].sample_ids)
        assert fault.what == f"the loss is nan at step 6; the samples were {ids}"
        assert f"The last good checkpoint is {options.folder}/checkpoints/step-3" in fault.mend
        assert [path.name for path in (options.folder / "checkpoints").iterdir()] == ["step-3"]
        assert [line["step"] for line in metrics(options.folder)] == [1, 2, 3, 4, 5]
    train(options, resume=True)
    assert greatest_difference(trained(options.folder / "final"), trained(whole.folder / "final")) == 0


@pytest.mark.parametrize("spoilt", [4, 8], ids=["before a checkpoint", "before the end"])
def test_weights_that_are_no_numbers_are_not_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    options = run_options(world, tmp_path, train={"steps": 8, "checkpoint": {"every": 2, "keep": 1}})
    step = torch.optim.AdamW.step
    steps: list[int] = []

    def spoil(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        made = step(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == spoilt:
            self.param_groups[0]["params"][0].data[0] = math.inf
        return made

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(UserError, match=f"1 weights are not finite after step {spoilt}: connector.linear_1"):
        train(options)
    assert [path.name for path in (options.folder / "checkpoints").iterdir()] == [f"step-{spoilt - 2}"]
    assert not (options.folder / "final").exists()


def test_not_every_sample_of_a_large_batch_is_named(tmp_path: Path) -> None:
    empty = torch.empty(0)
    batch = Batch(empty, empty, empty, sample_ids=tuple(f"s{i}" for i in range(100)))
    fault = loop._not_finite("the loss is nan at step 7", [batch], tmp_path).faults[0]
    assert fault.what.endswith("s30, s31 and 68 more")
    assert "There is no checkpoint" in fault.mend


def with_pictures(world: Path, folder: Path, broken: int, missing: int) -> list[dict[str, str]]:
    """The data of a run with some pictures that are no pictures, and some that are not there."""
    tiny = world / "datasets" / "tiny"
    rows = [r for r in json.loads((tiny / "train_instructions.json").read_text()) if "image" in r]
    for i, row in enumerate(rows):
        if i < broken + missing:
            row["image"] = str(folder / f"{row['id']}.png")
            if i < broken:
                Path(row["image"]).write_text("no picture")
        else:
            row["image"] = str(tiny / row["image"])
    (folder / "rows.json").write_text(json.dumps(rows))
    return [{"path": str(folder / "rows.json"), "image_root": "/"}]


def test_missing_pictures_are_named_before_the_first_step(world: Path, tmp_path: Path) -> None:
    options = run_options(world, tmp_path, data=with_pictures(world, tmp_path, broken=0, missing=25))
    with pytest.raises(UserError) as caught:
        train(options)
    named = [fault for fault in caught.value.faults if fault.where.startswith("sample train_")]
    assert len(named) == 20
    assert all(fault.what.startswith(f"no such picture: {tmp_path}/train_") for fault in named)
    assert "25 of" in caught.value.faults[-1].what
    assert not (options.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_also_by_a_worker(world: Path, tmp_path: Path, workers: int) -> None:
    data = with_pictures(world, tmp_path, broken=30, missing=0)
    options = run_options(world, tmp_path, data=data, train={"workers": workers})
    with pytest.raises(UserError) as caught:
        train(options)
    (fault,) = caught.value.faults
    assert fault.what.startswith("this picture cannot be read")
    assert fault.where.startswith(f"{tmp_path}/train_")


def test_a_run_that_would_never_prune_is_refused_at_once(world: Path, tmp_path: Path) -> None:
    tune = {**PLAIN, "language": {**SCULPT, "prune_at": 3}}
    with pytest.raises(UserError, match="the run ends after 3"):
        train(run_options(world, tmp_path, tune=tune))


def test_a_run_that_failed_before_its_first_step_may_be_started_again(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank 400"):
        train(run_options(world, tmp_path, tune={**PLAIN, "language": {**LORA, "rank": 400}}))
    train(run_options(world, tmp_path, train={"steps": 1}))


def test_two_precisions_in_one_process(world: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        model = {"base": str(world / "base"), "dtype": dtype}
        train(run_options(world, tmp_path, dtype, model=model, train={"steps": 1}))


def test_the_environment_scales_no_loss(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_options(world, tmp_path, "plain", train={"steps": 1})
    train(plain)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again = run_options(world, tmp_path, "again", train={"steps": 1})
    train(again)
    assert metrics(again.folder)[0]["grad_norm"] == metrics(plain.folder)[0]["grad_norm"]

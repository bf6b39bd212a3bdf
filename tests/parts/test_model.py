"""The spliced model against transformers' Llava with the same weights, and model folders on the move."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmtune.core.errors import UserError
from mmtune.data.batches import Batch, pad
from mmtune.data.chat import IGNORE, IMAGE_ID
from mmtune.parts import VisionLanguageModel
from mmtune.parts.connector.linear import LinearConnector
from mmtune.parts.model import assemble
from mmtune.parts.spec import PARTS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny

MIXED = [1, 0, 2, 3, 0, 1]
SPARE_ID = tiny.VOCABULARY - 1  # an embedding no token uses, the reference's image token
NEW_TOKENS = 12


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny.model(tmp_path / "parts")


def llava(model: VisionLanguageModel) -> LlavaForConditionalGeneration:
    """transformers' Llava with the weights of a model made of CLIP, mlp2x_gelu and Llama."""
    assert model.options.vision and model.options.vision.weights
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION),
        text_config=model.language.hf.config,
        image_token_index=SPARE_ID,
        vision_feature_layer=model.options.vision.layer,
        vision_feature_select_strategy="default",
        image_seq_length=model.image_tokens,
        tie_word_embeddings=False,
    )
    made = LlavaForConditionalGeneration(config).eval()
    tower = CLIPVisionModel.from_pretrained(model.options.vision.weights)
    made.model.vision_tower.load_state_dict(tower.state_dict())
    made.model.multi_modal_projector.load_state_dict(model.connector.state_dict())
    made.model.language_model.load_state_dict(model.language.hf.model.state_dict())
    made.lm_head.load_state_dict(model.language.hf.lm_head.state_dict())
    return made


def llava_inputs(model: VisionLanguageModel, batch: Batch) -> dict[str, Any]:
    given = {
        "input_ids": batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, SPARE_ID),
        "attention_mask": batch.attention_mask,
    }
    if len(batch.images):
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.vision.mean, model.vision.std))
        given["pixel_values"] = (batch.images / 255 - mean) / std
    return given


def logits(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """At the positions that are no padding."""
    with torch.no_grad():
        hidden = model.language.hidden(model.splice(batch), batch.attention_mask)
        return model.language.logits(hidden)[batch.attention_mask.bool()]


def same(one: VisionLanguageModel, other: VisionLanguageModel) -> bool:
    """Weights bit for bit; outputs nearly, as their last bit depends on where in memory a weight lies."""
    batch, mine, theirs = tiny.batch(MIXED), one.state_dict(), other.state_dict()
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
        return False
    return torch.allclose(logits(one, batch), logits(other, batch), rtol=1e-4, atol=1e-4)


def attach_lora(model: VisionLanguageModel, part: str, rank: int = 2) -> None:
    """With both factors drawn, so that it changes the outputs."""
    tuner = LoraOptions(lr=1e-3, rank=rank, alpha=4).make()
    tuner.attach(model, part)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in tuner.layers:
            for factor in tuner.pair(name):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)


# Forward


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize(
    "per_row", [MIXED, [0, 0, 0], [1], [1, 1, 1], [4, 0]], ids=["mixed", "none", "one", "ones", "several"]
)
def test_logits_are_those_of_llava(tmp_path: Path, per_row: list[int], layer: int) -> None:
    model = tiny.model(tmp_path, layer=layer)
    batch = tiny.batch(per_row)
    with torch.no_grad():
        expected = llava(model)(**llava_inputs(model, batch)).logits[batch.attention_mask.bool()]
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_every_picture_matters_and_only_to_its_own_row(model: VisionLanguageModel) -> None:
    """Otherwise the comparison above would not notice a picture in the wrong place."""
    batch = tiny.batch(MIXED)
    before = model.splice(batch)
    row_of = [row for row, count in enumerate(MIXED) for _ in range(count)]
    for picture, row in enumerate(row_of):
        changed = batch.images.clone()
        changed[picture] = 255 - changed[picture]
        after = model.splice(replace(batch, images=changed))
        moved = (after - before).abs().amax(dim=(1, 2)) > 1e-3
        assert moved.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("per_row", [MIXED, [0, 0]], ids=["mixed", "text only"])
def test_loss_is_the_sum_over_supervised_tokens(model: VisionLanguageModel, per_row: list[int]) -> None:
    batch = tiny.batch(per_row)
    assert batch.labels is not None
    with torch.no_grad():
        full = llava(model)(**llava_inputs(model, batch)).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(
            full.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-4)


def test_loss_of_rows_adds_up_over_any_split(model: VisionLanguageModel) -> None:
    batch = tiny.batch([1, 1, 1, 1])
    assert batch.labels is not None
    with torch.no_grad():
        parts = [
            model(Batch(batch.input_ids[i], batch.attention_mask[i], batch.images[i], batch.labels[i]))
            for i in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(model(batch), sum(parts))


def gradients(model: VisionLanguageModel, batch: Batch) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model.train()
    model(batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_batch_without_pictures_still_gives_every_weight_a_gradient(model: VisionLanguageModel) -> None:
    for part in ("vision", "connector"):
        FullOptions(lr=1e-3).make().attach(model, part)
    found = gradients(model, tiny.batch([0, 0, 0]))
    assert all(grad is not None for grad in found.values())
    seeing = {n: g for n, g in found.items() if n.startswith(("vision", "connector")) and g is not None}
    assert len(seeing) > 10 and not any(grad.any() for grad in seeing.values())
    with_pictures = gradients(model, tiny.batch(MIXED))
    assert all(grad is not None and grad.any() for n, grad in with_pictures.items() if n in seeing)


def test_a_batch_without_pictures_runs_no_frozen_tower(model: VisionLanguageModel) -> None:
    model.vision.requires_grad_(False)
    model.connector.requires_grad_(False)
    model.vision.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    model.train()
    model(tiny.batch([0, 0])).backward()


@pytest.mark.parametrize("pictures", [0, 2, 8])
def test_pictures_and_places_must_agree(model: VisionLanguageModel, pictures: int) -> None:
    batch = replace(tiny.batch(MIXED), images=tiny.pictures(pictures))
    with pytest.raises(ValueError, match=f"28 places for {pictures} pictures of 4 tokens"):
        model(batch)


def test_a_cut_picture_is_noticed(model: VisionLanguageModel) -> None:
    batch = tiny.batch([1])
    batch.input_ids[batch.input_ids.eq(IMAGE_ID).nonzero()[0].unbind()] = 9
    with pytest.raises(ValueError, match="3 places for 1 pictures"):
        model(batch)


# Generation


def questions() -> tuple[list[list[int]], list[int]]:
    """16 prompts, with and without pictures, and how many pictures each has."""
    per_row = [1, 0, 2, 1, 1, 0, 1, 3, 0, 1, 1, 2, 0, 1, 1, 1]
    return tiny.rows(per_row, seed=5), per_row


def answers(model: VisionLanguageModel, batch_size: int, left: bool = True) -> list[list[int]]:
    prompts, per_row = questions()
    images = tiny.pictures(sum(per_row), seed=5).split(per_row)
    found = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch = pad(prompts[part], model.language.pad_id, left=left)
        batch.images = torch.cat(images[part])
        found += model.generate(batch, NEW_TOKENS)
    return found


def ending(model: VisionLanguageModel) -> VisionLanguageModel:
    """Makes the end token likely enough that some answers end early."""
    with torch.no_grad():
        model.language.hf.lm_head.weight[2] *= 3
    return model


def test_batch_size_changes_no_answer(model: VisionLanguageModel) -> None:
    alone = answers(ending(model), 1)
    assert len({len(answer) for answer in alone}) > 2 and len({tuple(answer) for answer in alone}) > 12
    assert answers(model, 3) == alone
    assert answers(model, 16) == alone
    assert answers(model, 16, left=False) != alone


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_stop_strings_end_a_row_where_they_are_complete(model: VisionLanguageModel, batch_size: int) -> None:
    whole = answers(ending(model), 16)
    decode = model.language.tokenizer.decode
    said = [str(decode(ids)) for ids in whole]
    pairs = [text[i : i + 2] for text in said for i in range(len(text) - 1)]
    pairs = [pair for pair in pairs if pair.isascii()]
    stop = [pairs[0], pairs[-1]]  # a token is a byte here: they fall over two tokens
    prompts, per_row = questions()
    images = tiny.pictures(sum(per_row), seed=5).split(per_row)
    steps: list[int] = []
    model.language.hf.register_forward_hook(lambda *_: steps.append(1))
    found = []
    for start in range(0, len(prompts), batch_size):
        batch = pad(prompts[start : start + batch_size], model.language.pad_id, left=True)
        batch.images = torch.cat(images[start : start + batch_size])
        found += model.generate(batch, NEW_TOKENS, stop)
    stopped = 0
    for ids, cut in zip(whole, found, strict=True):
        ends = [n for n in range(1, len(ids) + 1) if any(string in str(decode(ids[:n])) for string in stop)]
        stopped += bool(ends)
        assert cut[: ends[0] if ends else None] == ids[: ends[0] if ends else None]
        if ends:  # what follows in a row that goes on with its batch is padding
            assert set(cut[ends[0] :]) <= {model.language.pad_id}
    assert 2 <= stopped < len(whole)
    if batch_size == 1:
        assert len(steps) < sum(min(len(ids) + 1, NEW_TOKENS) for ids in whole)


def test_answers_are_those_of_llava(model: VisionLanguageModel) -> None:
    reference: Any = llava(ending(model))
    prompts, per_row = questions()
    images = tiny.pictures(sum(per_row), seed=5).split(per_row)
    expected = []
    for prompt, pictures in zip(prompts, images, strict=True):
        batch = replace(pad([prompt], 0, left=True), images=pictures)
        given = llava_inputs(model, batch)
        made = reference.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2)
        new = made[0, len(prompt) :].tolist()
        expected.append(new[: new.index(2)] if 2 in new else new)
    assert answers(model, 16) == expected


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1.9}, {"suppress_tokens": list(range(100, 200))}, {"min_new_tokens": 9}]
)
def test_greedy_whatever_the_checkpoint_says(model: VisionLanguageModel, own: dict[str, Any]) -> None:
    """Qwen2's checkpoints bring a repetition penalty, which generate would apply unasked."""
    expected = answers(ending(model), 4)
    before = model.language.hf.generation_config
    before.update(**own)
    assert answers(model, 4) == expected
    assert model.language.hf.generation_config is before


def test_the_end_token_of_the_chat_format_ends_an_answer(model: VisionLanguageModel) -> None:
    assert model.end_ids == [2]
    model.language.tokenizer.eos_token = "<|pad|>"
    assert model.end_ids == [2, 0]


# Model folders


def test_saved_and_restored_under_any_name(model: VisionLanguageModel, tmp_path: Path) -> None:
    for name in ("final", "llava-lora-tuned", "x.safetensors"):
        model.save_pretrained(tmp_path / name)
        again = VisionLanguageModel.from_pretrained(tmp_path / name)
        assert same(model, again)
        assert not again.training and not again.connector.training
    assert list(tmp_path.rglob("*.bin")) == [] and list(tmp_path.rglob("*.pt")) == []


def test_what_ships_is_found_by_its_name_anywhere(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter, which lies in the same folder; as a model and as the base of another."""
    attach_lora(model, "language")
    model.eval().save_pretrained(tmp_path / "installed" / "tiny" / "model")
    monkeypatch.setattr("mmtune.core.files.share", lambda kind: tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    again = VisionLanguageModel.from_pretrained("data/tiny/model")
    assert same(model, again)
    merged = VisionLanguageModel.from_pretrained("data/tiny/model", merge=True)
    assert same(merged, assemble(ModelOptions(base="data/tiny/model")).eval())


def test_frozen_parts_are_references(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "runs/one/final")
    config = json.loads((tmp_path / "runs/one/final/config.json").read_text())
    assert config["vision"]["weights"] == "../../../parts/tower"
    assert config["language"]["weights"] == "../../../parts/lm"
    assert config["connector"]["weights"] == "connector"
    assert sorted(p.name for p in (tmp_path / "runs/one/final").iterdir()) == ["config.json", "connector"]


def test_moved_together_with_its_base(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "runs/final")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    for name in ("parts", "runs"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere/deep" / name)
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "elsewhere/deep/runs/final"))


def test_moved_without_its_base(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "runs/final")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere/deep/runs")
    with pytest.raises(UserError, match="no longer at"):
        VisionLanguageModel.from_pretrained(tmp_path / "elsewhere/deep/runs/final")


def test_read_through_a_link(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Relative paths count from where the folder is, as runs/ may be a link to another disk."""
    model.save_pretrained(tmp_path / "disk/a/b/runs/final")
    (tmp_path / "link").symlink_to(tmp_path / "disk/a/b/runs")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "link/final"))


def test_a_tokenizer_given_apart_is_kept(tmp_path: Path) -> None:
    options = tiny.parts(tmp_path)
    for file in (tmp_path / "lm").glob("*token*"):
        file.unlink()
    tiny.tokenizer().save_pretrained(tmp_path / "tokens")
    assert options.language
    options.language.tokenizer = str(tmp_path / "tokens")
    model = assemble(options).eval()
    model.save_pretrained(tmp_path / "final")
    again = VisionLanguageModel.from_pretrained(tmp_path / "final")
    assert same(model, again) and len(again.language.tokenizer) == 261


def test_everything_trained_stands_alone(model: VisionLanguageModel, tmp_path: Path) -> None:
    for part in PARTS:
        FullOptions(lr=1e-3).make().attach(model, part)
    model.save_pretrained(tmp_path / "final")
    shutil.rmtree(tmp_path / "parts")
    again = VisionLanguageModel.from_pretrained(tmp_path / "final")
    assert same(model, again)
    again.save_pretrained(tmp_path / "runs/next")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "runs/next"))


def test_made_from_configs_alone(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokens")
    config = {"model_type": "llama", **tiny.FAMILIES["llama"]}
    options = ModelOptions(
        vision=VisionOptions("clip", config=dict(tiny.VISION), layer=-2),
        connector=ConnectorOptions("linear"),
        language=LanguageOptions(config=config, tokenizer=str(tmp_path / "tokens")),
    )
    model = assemble(options).eval()
    model.save_pretrained(tmp_path / "final")
    shutil.rmtree(tmp_path / "tokens")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "final"))


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        VisionLanguageModel.from_pretrained(tmp_path / "nowhere")
    tiny.save_language(tmp_path / "lm")
    with pytest.raises(UserError, match="not the config of an mmtune model"):
        VisionLanguageModel.from_pretrained(tmp_path / "lm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {}}, "vision: 'tower' is missing"),
        ({"vision": None}, "vision: expected a mapping, found nothing"),
        ({"connector": {"kind": "linear", "colour": "red"}}, "connector.colour: unknown key 'colour'"),
        ({"language": {"weights": "language", "adapter": 3}}, "language.adapter: expected the path"),
    ],
)
def test_a_config_that_describes_no_model(
    model: VisionLanguageModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model.save_pretrained(tmp_path / "final")
    config = json.loads((tmp_path / "final/config.json").read_text())
    (tmp_path / "final/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        VisionLanguageModel.from_pretrained(tmp_path / "final")


# Parts in place of others


def test_each_part_replaced_on_its_own(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    tower = tiny.save_tower(tmp_path / "tower2", seed=7)
    language = tiny.save_language(tmp_path / "lm2", "qwen2", seed=7)
    other_connector = LinearConnector(model.vision.width, model.language.width)
    other_connector.save(tmp_path / "connector2")
    given: dict[str, Any] = {
        "vision": VisionOptions("clip", tower, layer=-1),
        "connector": ConnectorOptions("linear", str(tmp_path / "connector2")),
        "language": LanguageOptions(language),
    }
    for name, options in given.items():
        mixed = assemble(ModelOptions(base=str(tmp_path / "base"), **{name: options})).eval()
        assert not same(model, mixed)
        for kept in set(PARTS) - {name}:
            before, after = model.part(kept).state_dict(), mixed.part(kept).state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before)
        mixed.save_pretrained(tmp_path / f"mixed-{name}")
        assert same(mixed, VisionLanguageModel.from_pretrained(tmp_path / f"mixed-{name}"))


def test_a_tower_of_another_width(model: VisionLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    wide = VisionOptions("clip", tiny.save_tower(tmp_path / "wide", hidden_size=32))
    with pytest.raises(UserError, match="it takes 24 and gives 32, but the tower is 32 wide"):
        assemble(ModelOptions(base=str(tmp_path / "base"), vision=wide))
    new = ConnectorOptions("mlp2x_gelu")
    fits = assemble(ModelOptions(base=str(tmp_path / "base"), vision=wide, connector=new))
    assert fits.vision.width == 32
    with pytest.raises(UserError, match="connector takes 24 and gives 32, but the tower is 32 wide"):
        VisionLanguageModel(fits.vision, model.connector, model.language, fits.options)


# Adapters


def test_an_adapter_is_plain_pefts(model: VisionLanguageModel, tmp_path: Path) -> None:
    before = logits(model, tiny.batch(MIXED))
    attach_lora(model, "language")
    model.eval()
    batch = tiny.batch(MIXED)
    assert (logits(model, batch) - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "final")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "final"))

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "parts/lm")
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "final/adapter/language")).eval()
    with torch.no_grad():
        theirs = peft(inputs_embeds=model.splice(batch), attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(theirs[batch.attention_mask.bool()], logits(model, batch))


def test_restored_in_bfloat16(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Everything but the adapter, which peft keeps in fp32."""
    attach_lora(model, "language")
    model.eval().save_pretrained(tmp_path / "final")
    half = VisionLanguageModel.from_pretrained(tmp_path / "final", dtype="bfloat16")
    dtypes = {("lora" in name, parameter.dtype) for name, parameter in half.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    batch = tiny.batch(MIXED)
    with torch.no_grad():
        assert half(batch).item() == pytest.approx(model(batch).item(), rel=0.1)
    assert len(answers(half, 8)) == 16


def test_an_adapters_file_is_the_same_in_every_process(model: VisionLanguageModel, tmp_path: Path) -> None:
    """peft writes a set, whose order is another in each process; a model's hash hangs on it."""
    attach_lora(model, "language")
    model.save_pretrained(tmp_path / "final")
    listed = json.loads((tmp_path / "final/adapter/language/adapter_config.json").read_text())
    assert len(listed["target_modules"]) > 4
    assert listed["target_modules"] == sorted(listed["target_modules"])


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_of_any_part(model: VisionLanguageModel, tmp_path: Path, part: str) -> None:
    before = logits(model, tiny.batch(MIXED))
    attach_lora(model, part)
    model.eval()
    assert (logits(model, tiny.batch(MIXED)) - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "final")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "final"))


def test_merged_outputs_are_close(model: VisionLanguageModel, tmp_path: Path) -> None:
    attach_lora(model, "language")
    model.eval()
    model.save_pretrained(tmp_path / "final")
    merged = VisionLanguageModel.from_pretrained(tmp_path / "final", merge=True)
    assert not merged.adapters and not any("lora" in name for name, _ in merged.named_parameters())
    batch = tiny.batch(MIXED)
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert same(merged, VisionLanguageModel.from_pretrained(tmp_path / "merged"))


def test_a_tuned_model_as_the_base_of_another_training(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Its adapter is folded in, and the next one lies on a language model that is saved beside it."""
    attach_lora(model, "language")
    model.eval().save_pretrained(tmp_path / "first")
    second = assemble(ModelOptions(base=str(tmp_path / "first"))).eval()
    batch = tiny.batch(MIXED)
    torch.testing.assert_close(logits(second, batch), logits(model, batch), rtol=1e-3, atol=1e-3)
    attach_lora(second, "language", rank=3)
    second.eval().save_pretrained(tmp_path / "second")
    assert same(second, VisionLanguageModel.from_pretrained(tmp_path / "second"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "second/language")
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "second/adapter/language")).eval()
    with torch.no_grad():
        theirs = peft(inputs_embeds=second.splice(batch), attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(theirs[batch.attention_mask.bool()], logits(second, batch))


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_on_a_part_that_is_saved_with_the_model(
    model: VisionLanguageModel, tmp_path: Path, part: str
) -> None:
    for name in PARTS:
        FullOptions(lr=1e-3).make().attach(model, name)
    attach_lora(model, part)
    model.eval().save_pretrained(tmp_path / "final")
    assert same(model, VisionLanguageModel.from_pretrained(tmp_path / "final"))


def test_a_part_with_an_adapter_is_not_saved_alone(model: VisionLanguageModel, tmp_path: Path) -> None:
    attach_lora(model, "language")
    with pytest.raises(UserError, match="the language has an adapter"):
        model.save_part("language", tmp_path / "lm")
    model.merge_adapter("language")
    model.save_part("language", tmp_path / "lm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert torch.equal(plain.lm_head.weight, model.language.hf.lm_head.weight)


def test_replacing_a_part_leaves_its_adapter_behind(model: VisionLanguageModel, tmp_path: Path) -> None:
    attach_lora(model, "language")
    model.eval().save_pretrained(tmp_path / "tuned")
    restored = LanguageOptions(str(tmp_path / "parts/lm"))
    found = assemble(ModelOptions(base=str(tmp_path / "tuned"), language=restored)).eval()
    model.adapters["language"].unload()
    assert same(found, model)


def test_a_missing_adapter_is_named(model: VisionLanguageModel, tmp_path: Path) -> None:
    attach_lora(model, "language")
    model.save_pretrained(tmp_path / "final")
    (tmp_path / "final/adapter/language/adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        VisionLanguageModel.from_pretrained(tmp_path / "final")


def test_a_part_put_back(model: VisionLanguageModel, tmp_path: Path) -> None:
    """A tuned model with one part of its base is what the untuned model is with the other parts tuned."""
    batch = tiny.batch(MIXED)
    model.save_pretrained(tmp_path / "base")
    tuned = VisionLanguageModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in tuned.connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tuned.options.connector.weights = None  # type: ignore[union-attr]
    connector_alone = logits(tuned, batch)
    attach_lora(tuned, "language")
    tuned.eval().save_pretrained(tmp_path / "tuned")
    whole = logits(tuned, batch)
    tuned.connector.load_state_dict(model.connector.state_dict())
    language_alone = logits(tuned, batch)

    def made(**instead: Path) -> torch.Tensor:
        return logits(VisionLanguageModel.from_pretrained(tmp_path / "tuned", instead=instead), batch)

    base = tmp_path / "base"
    torch.testing.assert_close(made(), whole, rtol=0, atol=0)
    torch.testing.assert_close(made(language=base), connector_alone, rtol=0, atol=0)
    torch.testing.assert_close(made(connector=base), language_alone, rtol=0, atol=0)
    torch.testing.assert_close(made(connector=base, language=base), logits(model, batch), rtol=0, atol=0)
    different = [whole, connector_alone, language_alone, logits(model, batch)]
    for i, one in enumerate(different):
        assert all((one - other).abs().max() > 0.1 for other in different[:i])


def test_an_adapter_of_the_base_is_put_back_with_its_part(model: VisionLanguageModel, tmp_path: Path) -> None:
    plain = logits(model, tiny.batch(MIXED))
    attach_lora(model, "language")
    model.eval().save_pretrained(tmp_path / "first")
    second = assemble(ModelOptions(base=str(tmp_path / "first"))).eval()
    with torch.no_grad():
        second.language.hf.get_output_embeddings().weight.mul_(2)
    second.save_pretrained(tmp_path / "second")
    back = VisionLanguageModel.from_pretrained(tmp_path / "second", instead={"language": tmp_path / "first"})
    assert same(back, model)
    assert (logits(back, tiny.batch(MIXED)) - plain).abs().max() > 0.1

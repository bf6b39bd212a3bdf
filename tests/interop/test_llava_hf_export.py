"""mmtune export --to llava-hf: in transformers' own class and processor, and there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.interop import llava_hf_export, llava_hf_processor
from mmtune.interop.chat_templates import taking_lists
from mmtune.interop.importing import import_model
from mmtune.interop.llava_hf_export import export_llava_hf
from mmtune.interop.source import Wanted
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ModelOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny
from tests.conftest import FAMILIES, MakeTokenizer
from tests.tiny_llava import answers, compared, save_llava_hf


def theirs(folder: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def tuned(folder: Path, parts: tuple[str, ...] = ("language",), quantize: Any = None, **changes: Any) -> Path:
    """A model folder with drawn adapters on some parts, and a connector of its own."""
    options = tiny.parts(folder / "parts", **changes)
    model = assemble(
        ModelOptions(
            vision=options.vision, connector=options.connector, language=options.language, quantize=quantize
        )
    )
    generator = torch.Generator().manual_seed(4)
    for part in parts:
        tuner = LoraOptions(lr=1e-3, rank=2, alpha=3).make()
        tuner.attach(model, part)
        for name in tuner.layers:
            for factor in tuner.pair(name):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    model.save_pretrained(folder / "tuned")
    return folder / "tuned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shard", "tied", "fit"), [("5GB", False, "crop"), ("20KB", False, "pad"), ("5GB", True, "pad")]
)
def test_there_and_back_every_bit_is_the_same(
    tmp_path: Path, dtype: torch.dtype, shard: str, tied: bool, fit: str
) -> None:
    """Configs but for transformers' version; the source's processor_config holds its image processor too."""
    source = save_llava_hf(tmp_path / "source", dtype=dtype, shard=shard, tied=tied, fit=fit)
    import_model(str(source), tmp_path / "model")
    export_llava_hf(tmp_path / "model", tmp_path / "back")
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("source", "back")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype and torch.equal(tensor, after[name]), name
    configs = [LlavaConfig.from_pretrained(tmp_path / name).to_dict() for name in ("source", "back")]
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]
    texts = [(tmp_path / name / "generation_config.json").read_text() for name in ("source", "back")]
    assert texts[0] == texts[1]
    processors = [
        AutoProcessor.from_pretrained(tmp_path / name, backend="pil") for name in ("source", "back")
    ]
    pictures = [processor.image_processor.to_dict() for processor in processors]
    assert pictures[0] == pictures[1]
    for name in ("patch_size", "num_additional_image_tokens", "image_token", "image_token_id"):
        assert getattr(processors[0], name) == getattr(processors[1], name)
    vocabularies = [processor.tokenizer.get_vocab() for processor in processors]
    assert vocabularies[0] == vocabularies[1]


def test_names_are_those_of_transformers_4(tmp_path: Path) -> None:
    export_llava_hf(tuned(tmp_path, ()), tmp_path / "out")
    names = load_file(tmp_path / "out/model.safetensors").keys()
    starts = {name.split(".layers.")[0] for name in names if ".layers." in name}
    assert starts == {"language_model.model", "vision_tower.vision_model.encoder"}
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_2.bias"} <= names
    assert (
        not list((tmp_path / "out").glob("*.py"))
        and "auto_map" not in (tmp_path / "out/config.json").read_text()
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_back_in_mmtune_nothing_has_changed(tmp_path: Path, family: str) -> None:
    folder = tuned(tmp_path, (), family=family)
    export_llava_hf(folder, tmp_path / "out")
    import_model(str(tmp_path / "out"), tmp_path / "again")
    one, other = (VisionLanguageModel.from_pretrained(tmp_path / name) for name in ("tuned", "again"))
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert one.transform == other.transform
    assert one.options.vision and other.options.vision and other.options.language
    assert one.options.vision.layer == other.options.vision.layer == -2
    assert other.options.language.chat == "template"


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("parts", [("language",), ("language", "vision")])
def test_adapters_are_merged(tmp_path: Path, parts: Any, quantize: Any) -> None:
    """A tower that was tuned lacks the layers above the one that is used; its last one is taken."""
    folder = tuned(tmp_path, parts, quantize)
    made = export_llava_hf(folder, tmp_path / "out")
    model = VisionLanguageModel.from_pretrained(folder, dequantize=True)
    llava = theirs(tmp_path / "out")
    for pictures in ([0, 0], [1, 1], [0, 3, 1]):
        for left in (False, True):
            assert compared(model, llava, pictures, left) <= 1e-5
        mine, expected = answers(model, llava, pictures)
        assert mine == expected
    assert llava.config.vision_feature_layer == (-1 if "vision" in parts else -2)
    assert "merged in fp32" in [row["what"] for row in made["comparison"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parts", "tuned"]
    assert not (tmp_path / "out/merged").exists()


def vicuna(folder: Path, tokenizer: Any, chat: str, spare: int) -> Path:
    """A model folder with this tokenizer, its vocabulary with some rows to spare."""
    made = tuned(folder, ())
    weights = folder / "language"
    tiny.save_language(weights, vocab_size=len(tokenizer) + spare)
    tokenizer.save_pretrained(weights)
    config = json.loads((made / "config.json").read_text())
    config["language"] = {"chat": chat, "weights": "../language"}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("chat", ["vicuna_v1", "template"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_ours_for_every_kind_of_tokenizer(
    tmp_path: Path, make_tokenizer: MakeTokenizer, family: str, chat: str
) -> None:
    """Otherwise the export is refused. Its processor knows no picture yet, so the vocabulary grows."""
    tokenizer = make_tokenizer(family, "chatml" if chat == "template" else None)
    folder = vicuna(tmp_path, tokenizer, chat, spare=0)
    made = export_llava_hf(folder, tmp_path / "out")
    ids = next(row for row in made["comparison"] if row["what"].startswith("ids"))
    assert ids["largest"] == 0 and ids["positions"] > 190
    import_model(str(tmp_path / "out"), tmp_path / "back")
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["language"]["chat"] == chat
    config = LlavaConfig.from_pretrained(tmp_path / "out")
    assert config.image_token_index == len(tokenizer)
    text: Any = config.text_config
    assert text.vocab_size % 64 == 0 and text.vocab_size > len(tokenizer)
    held = load_file(tmp_path / "out/model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weight, old = held[name], len(tokenizer)
        assert len(weight) == text.vocab_size
        mean = weight[:old].mean(0)
        torch.testing.assert_close(weight[old:], mean.expand(len(weight) - old, -1))
    batch = tiny.batch([1, 0, 2])
    llava = theirs(tmp_path / "out")
    ids_in = batch.input_ids.masked_fill(batch.input_ids < 0, config.image_token_index)
    pixels = torch.randn(3, 3, tiny.SIZE, tiny.SIZE)
    found = llava(input_ids=ids_in, attention_mask=batch.attention_mask, pixel_values=pixels).logits
    assert int(found.argmax(-1).max()) < len(tokenizer)


def test_a_free_row_is_taken(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("llama_always")
    export_llava_hf(vicuna(tmp_path, tokenizer, "vicuna_v1", spare=3), tmp_path / "out")
    text: Any = LlavaConfig.from_pretrained(tmp_path / "out").text_config
    assert text.vocab_size == len(tokenizer) + 3


def test_vicunas_prompt_has_its_system_line(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    export_llava_hf(vicuna(tmp_path, make_tokenizer("llama_always"), "vicuna_v1", 0), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    asked: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:"
    )
    more: Any = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    assert processor.apply_chat_template(more, add_generation_prompt=True) == (
        "<s>Be brief. USER: What? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:"
    )
    made = import_model(str(tmp_path / "out"), tmp_path / "again")
    assert made["notes"] == [
        "pictures: pad, as its preprocessor_config.json says",
        "chat: vicuna_v1, as its template has it",
    ]


def test_one_dtype_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tuned(tmp_path), tmp_path / "out"
    assert main(["export", str(folder), str(out), "--to", "llava-hf", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    for row in (
        "rounded to bfloat16",
        "all in bfloat16",
        "transformers' class",
        "ids, its chat",
        "pixels, ",
    ):
        assert row in said
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_transformers_llava_cannot_hold(tmp_path: Path) -> None:
    folder = tuned(tmp_path, (), connector="linear")
    config = json.loads((folder / "config.json").read_text())
    config["language"]["chat"] = "plain"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        export_llava_hf(folder, tmp_path / "out")
    assert [fault.what[:23] for fault in refused.value.faults] == [
        "the connector is linear",
        "chat format plain leave",
    ]
    with pytest.raises(UserError, match="logit_scale of a cohere: transformers' Llava leaves it out"):
        export_llava_hf(tuned(tmp_path / "other", (), family="cohere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["logits", "ids", "pixels"])
def test_any_difference_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tuned(tmp_path, ())
    if what == "logits":
        write = llava_hf_export.write_tensors

        def damaged(place: Path, tensors: Any) -> None:
            name = "multi_modal_projector.linear_2.bias"
            write(place, {**tensors, name: tensors[name].changed(lambda tensor: tensor * 1.1)})

        monkeypatch.setattr(llava_hf_export, "write_tensors", damaged)
    elif what == "ids":
        monkeypatch.setattr(
            llava_hf_processor,
            "taking_lists",
            lambda tokens, text: taking_lists(tokens, text).replace("|user|", "|end|"),
        )
    else:
        compared_pixels = llava_hf_processor._pixels
        monkeypatch.setattr(
            llava_hf_processor, "_pixels", lambda w, a, b, t: compared_pixels(w, a, b + 0.001, t)
        )
    with pytest.raises(UserError, match=f"{what} differ by .*nothing was written"):
        export_llava_hf(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "tuned"]


def test_a_padded_source_keeps_its_fit(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    import_model(str(source), tmp_path / "model", Wanted(fit="pad"))
    export_llava_hf(tmp_path / "model", tmp_path / "out")
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert said["do_pad"] and said["image_processor_type"] == "LlavaImageProcessor"

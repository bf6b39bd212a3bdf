"""mmtune export --to llava, read back by the forward pass of tests/interop/original_llava.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlavaForConditionalGeneration

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.interop import llava_export
from mmtune.interop.importing import import_model
from mmtune.interop.llava_export import export_llava
from mmtune.interop.llava_hf_export import export_llava_hf
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny
from tests.interop import original_llava as original
from tests.interop.test_llava import QUESTIONS, agrees, shown

# A round trip leaves these out: where a model came from, with which version, and a setting for decoding that
# transformers 5 keeps in generation_config.json alone.
MAY_DIFFER = {"_name_or_path", "transformers_version", "max_length"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original.save_clip(tmp_path_factory.mktemp("clip") / "clip-vit-large-patch14-336")


def projector_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = "model.mm_projector."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def reference(folder: Path, layer: int = -2) -> original.Reference:
    """LLaVA's forward pass on an exported folder, the tower loaded by the name in its config."""
    tensors = original.read_all(folder)
    language = {name: t for name, t in tensors.items() if "mm_projector" not in name}
    config = json.loads((folder / "config.json").read_text())
    tower = Path(config["mm_vision_tower"])
    return original.Reference(tower, language, projector_of(tensors), config["mm_vision_select_layer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_a_round_trip_gives_the_same_files(
    tmp_path: Path, clip: Path, dtype: torch.dtype, projector: str
) -> None:
    said: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch."), "mm_projector_type": projector}
    source = original.save_llava(tmp_path / "source", clip, dtype=dtype, **said)
    import_model(str(source), tmp_path / "model")
    export_llava(tmp_path / "model", tmp_path / "again")
    before, after = original.read_all(source), original.read_all(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again")]
    for name in configs[0].keys() - MAY_DIFFER:
        assert configs[1][name] == configs[0][name], name
    # What the original leaves at transformers' defaults is written out.
    assert configs[1].keys() - configs[0].keys() == {"attention_bias", "rope_theta"}
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == json.loads(
        (source / "generation_config.json").read_text()
    )
    assert not (tmp_path / "again/vision_tower").exists()


def test_a_tower_inside_comes_out_beside(tmp_path: Path, clip: Path) -> None:
    tuned = original.wide(original.tower_tensors(clip), 0.2)
    source = original.save_llava(tmp_path / "source", clip, stored_tower=tuned)
    import_model(str(source), tmp_path / "model")
    export_llava(tmp_path / "model", tmp_path / "again")
    written = load_file(tmp_path / "again/vision_tower/model.safetensors")
    assert written.keys() == tuned.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tuned.items())
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["mm_vision_tower"] == str(tmp_path / "again/vision_tower")
    assert config["mm_vision_select_layer"] == -2
    (tmp_path / "again").rename(tmp_path / "elsewhere")
    import_model(str(tmp_path / "elsewhere"), tmp_path / "model_again")
    agrees(tmp_path / "model_again", original.Reference(tmp_path / "elsewhere/vision_tower", *halves(source)))


def halves(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Language model and projector of a source folder."""
    tensors = original.read_all(source)
    language = {n: t for n, t in tensors.items() if not any(w in n for w in ("mm_", "vision", "inv_freq"))}
    return language, projector_of(tensors)


def test_a_lora_comes_out_merged(tmp_path: Path, clip: Path) -> None:
    base = original.save_vicuna(tmp_path / "vicuna", dtype=torch.bfloat16)
    source = original.save_lora(tmp_path / "tuned", clip, base)
    import_model(str(source), tmp_path / "model")
    made = export_llava(tmp_path / "model", tmp_path / "whole")
    assert [row["what"] for row in made["comparison"]] == [
        "merged in fp32",
        "as written, float32",
        "LLaVA's order of things",
    ]
    written = original.read_all(tmp_path / "whole")
    factors = torch.load(source / "adapter_model.bin", weights_only=True)
    for name, tensor in original.language_tensors(dtype=torch.bfloat16).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = tensor.double()
        if f"{key}.lora_A.weight" in factors:
            a, b = (factors[f"{key}.lora_{half}.weight"].double() for half in "AB")
            expected = expected + 6 / 4 * (b @ a)
        torch.testing.assert_close(written[name].double(), expected, rtol=3e-7, atol=1e-6)
    agrees(tmp_path / "model", reference(tmp_path / "whole"))
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["mm_vision_tower"] == str(clip)


def tuned(folder: Path, clip: Path, *parts: str) -> Path:
    """A model of ours from an imported one, LoRA on some of its parts, the connector trained."""
    source = original.save_llava(folder / "source", clip, dtype=torch.float16)
    import_model(str(source), folder / "base")
    model = assemble(ModelOptions(base=str(folder / "base")), exact=["connector"])
    model.options.connector.weights = None  # type: ignore[union-attr]
    for parameter in model.connector.parameters():
        parameter.data += 0.05
    generator = torch.Generator().manual_seed(4)
    for part in parts:
        tuner = LoraOptions(lr=1e-3, rank=2, alpha=3).make()
        tuner.attach(model, part)
        for name in tuner.layers:
            for factor in tuner.pair(name):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    model.save_pretrained(folder / "tuned")
    return folder / "tuned"


def test_what_was_tuned_here(tmp_path: Path, clip: Path) -> None:
    folder = tuned(tmp_path, clip, "language")
    export_llava(folder, tmp_path / "whole")
    written = original.read_all(tmp_path / "whole")
    assert written["model.mm_projector.0.bias"].dtype == torch.float32
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["mm_vision_tower"] == str(clip)  # untouched: named, not copied
    import_model(str(tmp_path / "whole"), tmp_path / "again")
    agrees(tmp_path / "again", reference(tmp_path / "whole"))


def test_a_tuned_tower_is_written_beside(tmp_path: Path, clip: Path) -> None:
    folder = tuned(tmp_path, clip, "vision", "language")
    export_llava(folder, tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["mm_vision_select_layer"] == -1  # the layer above was never loaded
    import_model(str(tmp_path / "whole"), tmp_path / "again")
    agrees(tmp_path / "again", reference(tmp_path / "whole"))


def test_every_tensor_in_bf16(tmp_path: Path, clip: Path) -> None:
    folder = tuned(tmp_path, clip, "language")
    made = export_llava(folder, tmp_path / "whole", "bfloat16")
    found = {row["what"]: row for row in made["comparison"]}
    assert found["all rounded to bfloat16"]["relative"] > 1e-4 > found["LLaVA's order of things"]["relative"]
    assert {tensor.dtype for tensor in original.read_all(tmp_path / "whole").values()} == {torch.bfloat16}


def test_from_parts_of_transformers(tmp_path: Path) -> None:
    """A tower in the names of transformers 5 cannot be named: LLaVA's CLIPVisionModel would not find them."""
    model = tiny.model(tmp_path)
    model.save_pretrained(tmp_path / "model")
    made = export_llava(tmp_path / "model", tmp_path / "whole")
    assert all(
        name.startswith("vision_model.")
        for name in load_file(tmp_path / "whole/vision_tower/model.safetensors")
    )
    assert any("tokenizer.model" in note for note in made["notes"])
    assert any("chat: template" in note for note in made["notes"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "qwen2"}, "this is a qwen2"),
        ({"head_dim": 16}, "a head_dim of its own, 16"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type yarn"),
    ],
)
def test_what_llava_cannot_hold_is_said(tmp_path: Path, changes: Any, said: str) -> None:
    options = ModelOptions(
        vision=VisionOptions("clip", tiny.save_tower(tmp_path / "tower")),
        connector=ConnectorOptions("mlp2x_gelu"),
        language=LanguageOptions(tiny.save_language(tmp_path / "lm", **changes)),
    )
    assemble(options).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        export_llava(tmp_path / "model", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("what", ["projector", "rope", "layer"])
def test_a_wrong_export_is_refused_and_nothing_stays(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tuned(tmp_path, clip, "language")
    if what == "projector":
        as_llava = llava_export._as_llava

        def swapped(*given: Any) -> Any:
            made = as_llava(*given)
            first, second = "model.mm_projector.0.bias", "model.mm_projector.2.bias"
            made[first], made[second] = made[second], made[first]
            return made

        monkeypatch.setattr(llava_export, "_as_llava", swapped)
    else:
        config = llava_export._config
        wrong = {"rope_theta": 500.0} if what == "rope" else {"mm_vision_select_layer": -1}
        monkeypatch.setattr(llava_export, "_config", lambda *given: {**config(*given), **wrong})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="LLaVA's order of things: the logits differ by"):
        export_llava(folder, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_on_to_transformers_class(tmp_path: Path, clip: Path) -> None:
    """The original -> mmtune -> llava-hf: transformers' class gives the original's logits."""
    source = original.save_llava(tmp_path / "source", clip)
    import_model(str(source), tmp_path / "model")
    export_llava_hf(tmp_path / "model", tmp_path / "hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    mark = theirs.config.image_token_index
    own = original.Reference(clip, *halves(source))
    for question, pictures in zip(QUESTIONS, shown(), strict=True):
        ids = original.prompt_ids(source / "tokenizer.model", question)
        expected = own.logits(ids, pictures)
        told = [each for token in ids for each in ([mark] * tiny.IMAGE_TOKENS if token == -200 else [token])]
        seen = processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        with torch.no_grad():
            found = theirs(input_ids=torch.tensor([told]), **seen).logits[0, :, : original.VOCABULARY]
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_command_prints_what_it_did(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original.save_llava(tmp_path / "source", clip)
    assert main(["import", str(source), str(tmp_path / "model")]) == 0
    assert f"vision: {clip}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "again"), "--to", "llava"]) == 0
    printed = capsys.readouterr().out
    assert "LLaVA's order of things" in printed and f"vision: named {clip}" in printed


@pytest.mark.parametrize("legacy", [True, False])
def test_the_tokenizer_is_read_as_before(tmp_path: Path, clip: Path, legacy: bool) -> None:
    """As the source has it, imported, and saved with a language model that was merged."""
    source = original.save_llava(tmp_path / "source", clip)
    config = json.loads((source / "tokenizer_config.json").read_text())
    original.write(source / "tokenizer_config.json", {**config, "legacy": legacy})
    import_model(str(source), tmp_path / "model")
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    model.language.save(tmp_path / "saved")
    text = "Count</s>USER: to 12"
    plain = LlamaConfig()
    tokenizers = [
        AutoTokenizer.from_pretrained(folder, config=plain)
        for folder in (source, tmp_path / "model/language", tmp_path / "saved")
    ]
    assert len({tuple(tokenizer(text).input_ids) for tokenizer in tokenizers}) == 1
    assert {tokenizer.legacy for tokenizer in tokenizers} == {legacy}
    assert {tokenizer.pad_token for tokenizer in tokenizers} == {"<unk>"}
    assert (tmp_path / "saved/tokenizer.model").is_file()

"""The original LLaVA's folders in, against a forward pass of its own made of transformers' classes alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.batches import pad
from mmtune.data.chat import IMAGE_ID, Turn
from mmtune.interop import llava_forward
from mmtune.interop import weights as interop_weights
from mmtune.interop.importing import import_model
from mmtune.interop.source import Wanted
from mmtune.parts.model import VisionLanguageModel
from tests.interop import original_llava as original

# A row without, one with one and one with three pictures.
QUESTIONS = (
    "Count from 1 to 12.",
    "<image>\nWhat is shown here?",
    "<image>\n<image> and <image>\nWhich of these is red, and which are the two blue ones?",
)


def shown() -> list[list[Image.Image]]:
    """For each question its pictures, wide and tall ones, each another."""
    generator = np.random.default_rng(3)
    sizes = iter([(40, 24), (24, 40), (32, 32), (50, 20)])
    return [
        [Image.fromarray(generator.integers(0, 256, (*next(sizes), 3), dtype=np.uint8)) for _ in range(count)]
        for count in (question.count("<image>") for question in QUESTIONS)
    ]


def agrees(folder: Path, reference: original.Reference, most: float = 1e-5) -> None:
    """The model folder's prompts, logits and greedy answers are the reference's, padded on either side."""
    model = VisionLanguageModel.from_pretrained(folder)
    tokens = original.TOWER["image_size"] ** 2 // original.TOWER["patch_size"] ** 2
    pictures = shown()
    rows = [model.chat.prompt([Turn("user", question)]) for question in QUESTIONS]
    asked = [original.prompt_ids(folder / "language/tokenizer.model", question) for question in QUESTIONS]
    for row, ids in zip(rows, asked, strict=True):
        assert row == [each for token in ids for each in ([token] * (tokens if token == IMAGE_ID else 1))]
    expected = [reference.logits(ids, seen) for ids, seen in zip(asked, pictures, strict=True)]
    largest = max(float(logits.abs().max()) for logits in expected)
    batches = {}
    for left in (True, False):
        batch = pad(rows, model.language.pad_id, left=left)
        batch.images = torch.from_numpy(np.stack([model.transform(one) for seen in pictures for one in seen]))
        batches[left] = batch
        with torch.no_grad():
            hidden = model.language.hidden(model.splice(batch), batch.attention_mask)
            logits = model.language.logits(hidden)
        for row, mask, own in zip(logits, batch.attention_mask.bool(), expected, strict=True):
            assert float((row[mask] - own).abs().max()) < most * largest
    greedy = [reference.greedy(ids, seen, 12) for ids, seen in zip(asked, pictures, strict=True)]
    answers = model.generate(batches[True], 12)
    assert answers == greedy and len({tuple(answer) for answer in greedy}) == len(greedy)
    decode = model.language.tokenizer.decode
    assert [decode(answer) for answer in answers] == [decode(answer) for answer in greedy]


def dropped_buffers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original.save_clip(tmp_path_factory.mktemp("clip") / "clip-vit-large-patch14-336")


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original.save_vicuna(tmp_path_factory.mktemp("vicuna") / "vicuna-7b-v1.5")


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_a_whole_model_of_any_name(tmp_path: Path, clip: Path, form: str, projector: str) -> None:
    source = original.save_llava(tmp_path / "mpt-lora", clip, form=form, mm_projector_type=projector)
    made = import_model(str(source), tmp_path / "model")
    assert made["comparison"][0]["relative"] < 1e-5
    projected = original.projector_tensors(projector)
    agrees(tmp_path / "model", original.Reference(clip, original.language_tensors(), projected))
    assert json.loads((tmp_path / "model/config.json").read_text())["vision"]["layer"] == -2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_stay_as_they_were(tmp_path: Path, clip: Path, dtype: torch.dtype) -> None:
    source = original.save_llava(tmp_path / "source", clip, dtype=dtype)
    import_model(str(source), tmp_path / "model")
    expected = dropped_buffers(original.read_all(source))
    written = load_file(tmp_path / "model/language/model.safetensors")
    connector = load_file(tmp_path / "model/connector/model.safetensors")
    assert sum("mm_projector" not in name for name in expected) == len(dropped_buffers(written))
    for name, tensor in expected.items():
        own = name.removeprefix("model.mm_projector.")
        own = own.replace("0.", "linear_1.", 1).replace("2.", "linear_2.", 1) if own != name else own
        found = connector[own] if own in connector else written[name]
        assert found.dtype == dtype and torch.equal(found, tensor)
    assert (tmp_path / "model/language/tokenizer.model").read_bytes() == (
        source / "tokenizer.model"
    ).read_bytes()


def test_a_tuned_tower_inside_comes_first(tmp_path: Path, clip: Path) -> None:
    tuned = original.wide(original.tower_tensors(clip), 0.2)
    source = original.save_llava(tmp_path / "source", clip, stored_tower=tuned)
    made = import_model(str(source), tmp_path / "model")
    assert any("the tower that lies in the model" in note for note in made["notes"])
    written = load_file(tmp_path / "model/vision/model.safetensors")
    assert written.keys() == {name.removeprefix("vision_model.") for name in tuned}
    assert all(torch.equal(written[name.removeprefix("vision_model.")], t) for name, t in tuned.items())


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "module.model.mm_projector."])
def test_stage_one(tmp_path: Path, clip: Path, vicuna: Path, prefix: str) -> None:
    source = original.save_stage_one(tmp_path / "aligned", clip, prefix)
    with pytest.raises(UserError, match="what it was trained on") as refused:
        import_model(str(source), tmp_path / "model")
    assert "--base DIR" in str(refused.value)
    import_model(str(source / "mm_projector.bin"), tmp_path / "model", Wanted(base=str(vicuna)))
    projected = original.projector_tensors(seed=5)
    agrees(tmp_path / "model", original.Reference(clip, original.language_tensors(), projected))


@pytest.mark.parametrize(
    ("prefix", "form"),
    [("base_model.model.", "bin"), ("base_model.model.", "safetensors"), ("module.base_model.model.", "bin")],
)
def test_lora_is_its_base_and_the_sum_by_hand(
    tmp_path: Path, clip: Path, vicuna: Path, prefix: str, form: str
) -> None:
    source = original.save_lora(tmp_path / "tuned", clip, vicuna, prefix, form)
    import_model(str(source), tmp_path / "model")
    tensors = original.language_tensors()
    if form == "bin":
        factors = torch.load(source / "adapter_model.bin", weights_only=True)
    else:
        factors = load_file(source / "adapter_model.safetensors")
    for name, a in factors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            tensors[layer] = tensors[layer] + 6 / 4 * (factors[name.replace("_A", "_B")] @ a)
    agrees(tmp_path / "model", original.Reference(clip, tensors, original.projector_tensors(seed=7)))
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    assert [*model.adapters] == ["language"]
    written = load_file(tmp_path / "model/adapter/language/adapter_model.safetensors")
    assert written.keys() == factors.keys()
    assert all(torch.equal(written[name], factors[name]) for name in factors)


def test_lora_on_a_whole_model(tmp_path: Path, clip: Path) -> None:
    """Its projector takes the place of the base's."""
    base = original.save_llava(tmp_path / "base", clip)
    source = original.save_lora(tmp_path / "tuned", clip, "nowhere/at-all")
    import_model(str(source), tmp_path / "model", Wanted(base=str(base)))
    written = load_file(tmp_path / "model/connector/model.safetensors")
    assert torch.equal(written["linear_1.bias"], original.projector_tensors(seed=7)["0.bias"])


def test_where_the_tower_is_looked_for(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = "openai/clip-vit-large-patch14-336"
    source = original.save_llava(tmp_path / "source", hub)
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "non_lora_trainables.bin" in allow_patterns  # beside an adapter in safetensors
        return str(clip)

    monkeypatch.setattr(interop_weights, "snapshot_download", download)
    import_model(str(source), tmp_path / "of_the_hub")
    assert asked and set(asked) == {hub}
    assert json.loads((tmp_path / "of_the_hub/vision/origin.json").read_text()) == {"copy_of": hub}
    monkeypatch.undo()
    with pytest.raises(UserError, match="not to be had from the hub") as refused:
        import_model(str(source), tmp_path / "nowhere")
    assert "--vision DIR" in str(refused.value)
    assert main(["import", str(source), str(tmp_path / "said"), "--vision", str(clip)]) == 0
    clip_beside = source / "clip-vit-large-patch14-336"
    clip_beside.symlink_to(clip)
    import_model(str(source), tmp_path / "beside")
    written = [load_file(tmp_path / each / "vision/model.safetensors") for each in ("said", "beside")]
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])


@pytest.mark.parametrize(("ratio", "fit"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_how_pictures_become_square(tmp_path: Path, clip: Path, ratio: str | None, fit: str) -> None:
    source = original.save_llava(tmp_path / "source", clip, image_aspect_ratio=ratio)
    import_model(str(source), tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["vision"]["fit"] == fit


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_projector_type": "identity"}, "no connector for mm_projector_type 'identity'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "no connector for mm_projector_type 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls_patch"}, "keeps the CLS token"),
        ({"mm_vision_select_layer": 3}, "mm_vision_select_layer is 3"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
        ({"model_type": "llava_mpt"}, "no Llama or Vicuna"),
        ({"s2": True}, "several sizes"),
        ({"mm_vision_tower": None}, "mm_vision_tower is None"),
        ({"mm_vision_select_layer": -9}, "source/config.json: layer -9 of a tower with 4 layers"),
        ({"hidden_size": 40}, "by the config"),
    ],
)
def test_what_mmtune_cannot_hold_is_said(tmp_path: Path, clip: Path, fields: Any, said: str) -> None:
    source = original.save_llava(tmp_path / "source", clip)
    config = json.loads((source / "config.json").read_text())
    original.write(source / "config.json", {**config, **fields})
    with pytest.raises(UserError, match=said):
        import_model(str(source), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_fault_of_a_config_at_once(tmp_path: Path, clip: Path) -> None:
    fields: dict[str, Any] = {"image_aspect_ratio": "anyres", "mm_use_im_start_end": True, "s2": True}
    source = original.save_llava(tmp_path / "source", clip, **fields)
    with pytest.raises(UserError) as refused:
        import_model(str(source), tmp_path / "model")
    assert len(refused.value.faults) == 3


def changed(source: Path, change: Any) -> None:
    """Rewrites a folder's two .bin files as `change` makes their tensors."""
    tensors = original.read_all(source)
    change(tensors)
    original.save_bin(source, tensors, shards=2)


def without(*words: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(word in name for word in words)]:
            del tensors[name]

    return change


def with_shape(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("mm_projector"), "it has no projector"),
        (without("mm_projector.2"), "the connector lacks linear_2.weight"),
        (without("layers.1.mlp.up_proj"), "the language lacks model.layers.1.mlp.up_proj.weight"),
        (
            with_shape("model.mm_projector.0.weight", 32, 20),
            "linear_1.weight is 32 x 20, by the config 32 x 24",
        ),
        (with_shape("model.norm.weight", 16), "model.norm.weight is 16, by the config 32"),
        (with_shape("model.image_newline", 32), "belong to no part of LLaVA-1.5: model.image_newline"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path: Path, clip: Path, change: Any, said: str) -> None:
    source = original.save_llava(tmp_path / "source", clip)
    changed(source, change)
    with pytest.raises(UserError, match=said):
        import_model(str(source), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_shard_is_named(tmp_path: Path, clip: Path) -> None:
    source = original.save_llava(tmp_path / "source", clip)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="no such file") as refused:
        import_model(str(source), tmp_path / "model")
    assert "pytorch_model-00002-of-00002.bin" in str(refused.value)


class Code:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize(
    "name", ["pytorch_model-00002-of-00002.bin", "non_lora_trainables.bin", "adapter_model.bin"]
)
def test_code_in_a_file_of_weights_does_not_run(tmp_path: Path, clip: Path, vicuna: Path, name: str) -> None:
    if name.startswith("pytorch_model"):
        source = original.save_llava(tmp_path / "source", clip)
    else:
        source = original.save_lora(tmp_path / "source", clip, vicuna)
    ran = tmp_path / "it_ran"
    torch.save({"model.norm.weight": Code(ran)}, source / name)
    with pytest.raises(UserError, match="not a whole file of tensors alone"):
        import_model(str(source), tmp_path / "model")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Code(ran)))  # which would have run it
    assert ran.exists()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
            "no LoRA",
        ),
        ("base_model.model.model.mm_projector.0", "no LoRA"),
        ("base_model.model.model.layers.9.self_attn.q_proj", "no LoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "expected 4 x 32"),
    ],
)
def test_an_adapter_elsewhere_or_of_another_size_is_refused(
    tmp_path: Path, clip: Path, vicuna: Path, key: str, said: str
) -> None:
    source = original.save_lora(tmp_path / "source", clip, vicuna)
    factors = torch.load(source / "adapter_model.bin", weights_only=True)
    factors |= {f"{key}.lora_A.weight": torch.zeros(4, 24), f"{key}.lora_B.weight": torch.zeros(24, 4)}
    torch.save(factors, source / "adapter_model.bin")
    with pytest.raises(UserError, match=said):
        import_model(str(source), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: [], "fields and their values are expected"),
        (lambda config: {name: config[name] for name in config if name != "r"}, "r, the rank, is None"),
    ],
)
def test_a_broken_config_of_an_adapter_is_refused(
    tmp_path: Path, clip: Path, vicuna: Path, change: Any, said: str
) -> None:
    source = original.save_lora(tmp_path / "source", clip, vicuna)
    file = source / "adapter_config.json"
    original.write(file, change(json.loads(file.read_text())))
    with pytest.raises(UserError, match=f"{file}: {said}"):
        import_model(str(source), tmp_path / "model")


def test_an_adapter_that_lacks_a_layer_is_named_where_it_lies(
    tmp_path: Path, clip: Path, vicuna: Path
) -> None:
    source = original.save_lora(tmp_path / "source", clip, vicuna)
    factors = torch.load(source / "adapter_model.bin", weights_only=True)
    kept = {name: factor for name, factor in factors.items() if "layers.1.mlp.up_proj" not in name}
    torch.save(kept, source / "adapter_model.bin")
    lacking = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    with pytest.raises(UserError, match=f"{source}: the adapter lacks {lacking}"):
        import_model(str(source), tmp_path / "model")


def test_a_chat_template_that_is_asked_for_has_to_be_there(tmp_path: Path, clip: Path) -> None:
    source = original.save_llava(tmp_path / "source", clip)
    with pytest.raises(UserError, match=f"{source}: the tokenizer has no chat template"):
        import_model(str(source), tmp_path / "model", Wanted(chat="template"))


def test_half_an_adapter_is_refused(tmp_path: Path, clip: Path, vicuna: Path) -> None:
    source = original.save_lora(tmp_path / "source", clip, vicuna)
    factors = torch.load(source / "adapter_model.bin", weights_only=True)
    del factors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    torch.save(factors, source / "adapter_model.bin")
    with pytest.raises(UserError, match=r"up_proj.lora_A.weight is there, .*up_proj.lora_B.weight is not"):
        import_model(str(source), tmp_path / "model")


@pytest.mark.parametrize("file", ["mm_projector.bin", "non_lora_trainables.bin"])
def test_what_was_trained_has_to_be_there(tmp_path: Path, clip: Path, vicuna: Path, file: str) -> None:
    if file == "mm_projector.bin":
        source, said = original.save_stage_one(tmp_path / "source", clip), "no weights"
    else:
        source, said = original.save_lora(tmp_path / "source", clip, vicuna), "no such file"
    (source / file).unlink()
    with pytest.raises(UserError, match=said):
        import_model(str(source), tmp_path / "model", Wanted(base=str(vicuna)))


@pytest.mark.parametrize("what", ["layer", "projector", "lora"])
def test_a_difference_is_seen(
    tmp_path: Path, clip: Path, vicuna: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Were the import wrong, the comparison would say so, and nothing would stay."""
    source = original.save_lora(tmp_path / "source", clip, vicuna)
    if what == "lora":
        monkeypatch.setattr(llava_forward, "_updates", lambda found: {})
    elif what == "projector":
        monkeypatch.setattr(llava_forward, "gelu", torch.nn.functional.relu)
    else:
        monkeypatch.setattr(llava_forward, "gelu", lambda hidden: hidden + 1e-2)
    with pytest.raises(UserError, match="as imported: the logits differ by"):
        import_model(str(source), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

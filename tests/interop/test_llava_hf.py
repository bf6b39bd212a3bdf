"""mmtune import of llava-hf folders, against transformers' own class on the same files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.chat import IMAGE_ID, VICUNA_SYSTEM, Turn
from mmtune.interop import llava_hf
from mmtune.interop.importing import import_model
from mmtune.interop.source import Wanted
from mmtune.parts.model import VisionLanguageModel
from tests import tiny_models as tiny
from tests.interop import original_llava as original
from tests.tiny_llava import answers, compared, save_llava_hf

OLD = {"vision_tower.": "vision_tower.vision_model."}  # transformers 4.x
MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Writes a folder's tensors anew with other prefixes."""
    held = load_file(folder / "model.safetensors")
    for old, new in prefixes.items():
        held = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in held.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path: Path, family: str, capsys: Any) -> None:
    source = save_llava_hf(tmp_path / "source", family, tied=family == "qwen2")
    import_model(str(source), tmp_path / "model")
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    theirs = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    print(f"\n{family:8} pictures per row, padding: largest difference of logits / largest logit")
    for pictures in ([0, 0], [1, 1, 1], [3, 3], [0, 1, 3]):
        for left in (False, True):
            found = compared(model, theirs, pictures, left)
            print(f"    {pictures!s:10} {'left' if left else 'right':6} {found:.1e}")
            assert found <= 1e-5
        mine, expected = answers(model, theirs, pictures)
        assert mine == expected and any(mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("names", "kind"),
    [({}, "one file"), (OLD, "one file"), (MEMORY, "one file"), ({}, "shards"), ({}, "bin")],
)
def test_every_tensor_is_written_as_it_was(tmp_path: Path, dtype: Any, names: Any, kind: str) -> None:
    source = save_llava_hf(tmp_path / "source", dtype=dtype, shard="20KB" if kind == "shards" else "5GB")
    own = LlavaForConditionalGeneration.from_pretrained(source).state_dict()
    if names:
        rename(source, names)
    if kind == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    import_model(str(source), tmp_path / "model")
    found = {
        **{
            f"model.vision_tower.{name}": t
            for name, t in load_file(tmp_path / "model/vision/model.safetensors").items()
        },
        **{
            f"model.multi_modal_projector.{name}": t
            for name, t in load_file(tmp_path / "model/connector/model.safetensors").items()
        },
        **{
            f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: t
            for name, t in load_file(tmp_path / "model/language/model.safetensors").items()
        },
    }
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "model/language/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_what_its_files_say_of_pictures_and_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_llava_hf(tmp_path / "source")
    assert main(["import", str(source), str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "pictures: crop, as its processor_config.json says. LLaVA-1.5 itself was trained" in said
    assert "chat: vicuna_v1. Its template asks as USER: ... ASSISTANT: but has no system line" in said
    assert "as imported" in said
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["vision"]["fit"] == "crop" and config["language"]["chat"] == "vicuna_v1"
    assert config["vision"]["layer"] == -2
    assert main(["import", str(source), str(tmp_path / "padded"), "--fit", "pad"]) == 0
    assert "pictures: pad, as asked; its processor_config.json says crop" in capsys.readouterr().out
    assert json.loads((tmp_path / "padded/config.json").read_text())["vision"]["fit"] == "pad"
    save_llava_hf(tmp_path / "pads", fit="pad")
    made = import_model(str(tmp_path / "pads"), tmp_path / "pads_too")
    assert made["notes"][0] == "pictures: pad, as its processor_config.json says"


def test_another_chat_template_is_kept_and_takes_texts(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    lists = (
        "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (source / "chat_template.jinja").write_text(lists)
    made = import_model(str(source), tmp_path / "model")
    assert made["notes"][1] == "chat: template, the one in its files"
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    ids = model.chat.prompt([Turn("user", "<image>\nWhat?")])
    text = model.language.tokenizer.decode([i for i in ids if i != IMAGE_ID])
    assert text == "<|user|>\nWhat?<|end|><|assistant|>" and ids.count(IMAGE_ID) == tiny.IMAGE_TOKENS


def test_a_template_with_its_system_line_is_vicunas(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    file = source / "chat_template.jinja"
    file.write_text(VICUNA_SYSTEM + " " + file.read_text())
    assert import_model(str(source), tmp_path / "m")["notes"][1] == "chat: vicuna_v1, as its template has it"


def test_a_template_with_another_system_line_is_kept(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    file = source / "chat_template.jinja"
    file.write_text("You are a careful radiologist. " + file.read_text())
    assert import_model(str(source), tmp_path / "m")["notes"][1] == "chat: template, the one in its files"
    model = VisionLanguageModel.from_pretrained(tmp_path / "m")
    asked = model.language.tokenizer.decode(model.chat.prompt([Turn("user", "What?")]))
    assert asked == "You are a careful radiologist. USER: What? ASSISTANT:"


def test_the_model_of_its_tokenizer_comes_along(tmp_path: Path) -> None:
    original.save_tokenizer(tmp_path / "tokenizer")
    original.write(tmp_path / "tokenizer/config.json", {"model_type": "llama"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    source = save_llava_hf(tmp_path / "source", tokenizer=tokenizer)
    shutil.copy(tmp_path / "tokenizer/tokenizer.model", source)
    import_model(str(source), tmp_path / "model")
    copied = tmp_path / "model/language/tokenizer.model"
    assert copied.read_bytes() == (source / "tokenizer.model").read_bytes()
    text = "A red square.</s>USER: <image>What is 12, and 7?"
    same = [AutoTokenizer.from_pretrained(each)(text)["input_ids"] for each in (source, copied.parent)]
    assert same[0] == same[1]


def test_what_a_whole_model_has_is_not_named_beside_it(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    with pytest.raises(UserError) as refused:
        import_model(str(source), tmp_path / "model", Wanted(base="some/model", vision="some/tower"))
    assert [fault.what[:12] for fault in refused.value.faults] == ["--base is fo", "--vision is "]


def test_a_layer_counted_from_below(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source", vision_feature_layer=2)
    import_model(str(source), tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["vision"]["layer"] == -3


def damaged(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    norm = "language_model.model.norm.weight"
    if how == "no projector":
        held = {name: t for name, t in held.items() if "projector" not in name}
    elif how == "half a projector":
        del held["multi_modal_projector.linear_2.bias"]
    elif how == "wrong shape":
        held[norm] = held[norm][:-1].clone()
    elif how == "renamed":
        held["language_model.model.nrom.weight"] = held.pop(norm)
    elif how == "unknown":
        held["adapter.weight"] = torch.ones(1)
    elif how == "missing":
        del held["vision_tower.encoder.layers.3.mlp.fc1.weight"]
    save_file(held, file, metadata={"format": "pt"})
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no projector", r"it has no projector \(multi_modal_projector"),
        ("half a projector", "the connector lacks linear_2.bias"),
        ("wrong shape", "the language's model.norm.weight is 31, by the config 32"),
        ("renamed", "the language lacks model.norm.weight"),
        ("unknown", "1 tensors belong to no part of a llava-hf model: adapter.weight"),
        ("missing", "the vision lacks encoder.layers.3.mlp.fc1.weight"),
        ("cut", "not a whole safetensors file"),
    ],
)
def test_damage_is_refused_and_nothing_stays(tmp_path: Path, how: str, said: str, capsys: Any) -> None:
    source = save_llava_hf(tmp_path / "source")
    damaged(source, how)
    assert main(["import", str(source), str(tmp_path / "model")]) == 2
    assert str(source) in (err := capsys.readouterr().err)
    assert re.search(said, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_logits_are_refused_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_llava_hf(tmp_path / "source")
    true = llava_hf.own_logits
    monkeypatch.setattr(llava_hf, "own_logits", lambda *given: true(*given) * 1.001)
    with pytest.raises(UserError, match=r"as imported: the logits differ by 1\.0e-03 of the largest"):
        import_model(str(source), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_held_is_said_at_once(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {
        "vision_feature_layer": [-2, -1],
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "relu",
        "vision_config": {**config["vision_config"], "model_type": "siglip_vision_model"},
        "text_config": {**config["text_config"], "model_type": "cohere"},
    }
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        import_model(str(source), tmp_path / "model")
    said = [fault.what for fault in refused.value.faults]
    assert [words[:24] for words in said] == [
        "its tower is a siglip_vi",
        "it joins the features of",
        "vision_feature_select_st",
        "its projector (relu, wit",
        "logit_scale of a cohere:",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"height": 16, "width": 16}}, "it squashes pictures to a square"),
        ({"resample": 2}, "resample 2: mmtune resizes bicubically"),
        ({"crop_size": {"height": 8, "width": 8}}, r"pictures of \[8, 16\] pixels for a tower that takes 16"),
        ({"do_normalize": False}, "do_normalize is off"),
        ({"do_center_crop": False}, "do_center_crop is off"),
        (None, "no image processor"),
    ],
)
def test_pictures_that_mmtune_would_make_otherwise(tmp_path: Path, changes: Any, said: str) -> None:
    source = save_llava_hf(tmp_path / "source")
    file = source / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] = config["image_processor"] | changes if changes else None
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        import_model(str(source), tmp_path / "model")


def test_no_template_wants_a_word(tmp_path: Path) -> None:
    source = save_llava_hf(tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="it holds no chat template"):
        import_model(str(source), tmp_path / "model")
    import_model(str(source), tmp_path / "model", Wanted(chat="vicuna_v1"))


def test_where_a_model_folder_is_expected_the_command_is_said(tmp_path: Path, capsys: Any) -> None:
    source = save_llava_hf(tmp_path / "renamed_by_its_user")
    command = f"mmtune import {source} DST"
    with pytest.raises(UserError) as refused:
        VisionLanguageModel.from_pretrained(source)
    assert command in str(refused.value) and "LlavaForConditionalGeneration" in str(refused.value)
    assert main(["check", "scripts/tiny/lora.yaml", f"model.base={source}"]) == 2
    assert command in capsys.readouterr().err
    shutil.copytree(source, tmp_path / "original")
    (tmp_path / "original/config.json").write_text(
        '{"model_type": "llava", "mm_vision_tower": "openai/clip"}'
    )
    with pytest.raises(UserError, match="in the layout of the original LLaVA"):
        VisionLanguageModel.from_pretrained(tmp_path / "original")

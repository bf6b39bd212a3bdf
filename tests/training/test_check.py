"""`mmtune check`: what it shows is what training would do, and all faults are told of together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.batches import Example
from mmtune.data.chat import IMAGE, Chat, Turn
from mmtune.parts.model import assemble
from mmtune.parts.outline import outline_of
from mmtune.parts.spec import PARTS
from mmtune.training.check import Gpus, check_run, show
from mmtune.training.loop import train
from tests.tiny_models import FAMILIES, VISION
from tests.world import FULL, LORA, SCULPT, metrics, run_file, run_options

Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What checking a run prints."""

    def check(path: Path, *overrides: str, **options: Any) -> str:
        capsys.readouterr()
        check_run(path, overrides, **options)
        return capsys.readouterr().out

    return check


def faults(path: Path, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_run(path, overrides, **options)
    return [f"{fault.where}: {fault.what}" for fault in caught.value.faults]


def rows(world: Path) -> Any:
    return json.loads((world / "datasets/tiny/train_instructions.json").read_text())


def data(world: Path, folder: Path, changed: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The `data` block of a training file of one's own, with the world's pictures."""
    (folder / "mine.json").write_text(json.dumps(changed))
    return [{"path": str(folder / "mine.json"), "image_root": str(world / "datasets/tiny")}]


def test_a_run_without_faults(world: Path, tmp_path: Path, said: Said) -> None:
    path = run_file(world, tmp_path, tune={"connector": FULL, "language": SCULPT})
    first, second, *rest = rows(world)
    out = said(path, samples=2)
    assert "3 steps of 8 samples" in out
    assert f"{2 + len(rest)} samples, " in out
    assert "lorasculpt" in out
    for row in (first, second):
        assert f"\nsample {row['id']}\n" in out
        for turn in row["conversations"][1::2]:
            assert f"<|assistant|>[[{turn['value']}<|end|>]]" in out
    assert out.count("\nsample ") == 2
    assert out.count("[[") == sum(len(row["conversations"][1::2]) for row in (first, second))
    assert out.count("<image x16>") == sum("image" in row for row in (first, second))
    assert list(tmp_path.iterdir()) == [path], "a check writes nothing"


def test_steps_and_samples_are_those_of_the_training(world: Path, tmp_path: Path, said: Said) -> None:
    changes: dict[str, Any] = {"train": {"steps": None, "epochs": 0.4, "batch_size": 16}}
    out = said(run_file(world, tmp_path, **changes))
    train(run_options(world, tmp_path, **changes))
    assert f"{len(metrics(tmp_path / 'run'))} steps of 16 samples" in out


def test_the_outline_has_every_shape_and_no_weights(world: Path, tmp_path: Path) -> None:
    options = run_options(world, tmp_path, tune={"vision": LORA, "connector": FULL, "language": SCULPT})
    real, outline = assemble(options.model), outline_of(options.model)
    assert {tensor.device.type for tensor in outline.state_dict().values()} == {"meta"}
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (real, outline)]
    assert shapes[0] == shapes[1]
    (stage,) = options.all_stages()
    tables = []
    for model in (real, outline):
        tuners = {part: getattr(stage.tune, part).make() for part in PARTS}
        tables.append([row for part, tuner in tuners.items() for row in tuner.attach(model, part)])
    assert tables[0] == tables[1]


def test_a_base_with_adapters_has_an_outline_too(world: Path, tmp_path: Path, said: Said) -> None:
    final = train(run_options(world, tmp_path))
    options = run_options(world, tmp_path, "second", model={"base": str(final)})
    shapes = [
        {name: tensor.shape for name, tensor in m.state_dict().items()}
        for m in (assemble(options.model), outline_of(options.model))
    ]
    assert shapes[0] == shapes[1]
    assert "[[" in said(tmp_path / "second.yaml")


def test_every_stage_is_shown(world: Path, tmp_path: Path, said: Said) -> None:
    some = rows(world)[:9]
    block = {
        "data": data(world, tmp_path, some),
        "train": {"steps": 4, "batch_size": 3, "max_length": 512},
    }
    stages = [
        {"name": "align", **block, "chat": "plain", "tune": {"connector": FULL}},
        {"name": "task", **block, "tune": {"language": LORA}},
    ]
    out = said(run_file(world, tmp_path, stages=stages), samples=1)
    first, second = out.split("Stage 2: task")
    assert "Stage 1: align" in first
    asked = some[0]["conversations"][0]["value"].replace(IMAGE, "").strip()
    assert "chat format: plain; the model's own is template" in first and asked not in first
    assert "chat format: template" in second and asked in second
    assert "full" in first and "lora" not in first
    assert "lora" in second and "full" not in second
    assert first.count("[[") == 1  # plain leaves nothing between one answer and the next
    assert second.count("[[") == len(some[0]["conversations"][1::2])


def test_replayed_samples_are_counted_as_in_training(
    world: Path, tmp_path: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = world / "datasets/tiny"
    changes: dict[str, Any] = {
        "data": [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}],
        "replay": {
            "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
            "share": 0.3,
        },
        "train": {"steps": None, "epochs": 1},
    }
    out = said(run_file(world, tmp_path, **changes))
    line = "replay: 17 of 92 samples in each epoch, beside 40 of the stage's own"
    assert line in out and "8 steps of 8 samples, 1.12 epochs" in out
    train(run_options(world, tmp_path, **changes))
    assert line in " ".join(capsys.readouterr().err.split())
    assert len(metrics(tmp_path / "run")) == 8


def test_faults_of_replayed_data_are_found_with_the_others(world: Path, tmp_path: Path) -> None:
    tiny = world / "datasets/tiny"
    bad = {"id": "empty", "conversations": []}
    replay = {"data": data(world, tmp_path, [bad, *rows(world)]), "share": 0.001}
    own = [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}]
    path = run_file(world, tmp_path, data=own, replay=replay)
    for overrides, more in (((), ()), (("train.clip=-1",), ("train.clip",))):
        found = faults(path, *overrides)
        for word in ("empty", "share of 0.001 beside 40 samples comes to none", *more):
            assert any(word in fault for fault in found), (word, found)
    share = next(fault for fault in found if "comes to none" in fault)
    assert "run.yaml, line" in share and "replay.share" in share


def test_a_chat_format_that_is_unknown_or_cannot_be_served(world: Path, tmp_path: Path) -> None:
    assert any(
        "unknown chat format 'plan'" in said for said in faults(run_file(world, tmp_path, chat="plan"))
    )
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    described = json.loads((base / "config.json").read_text())
    described["language"]["chat"] = "plain"
    (base / "config.json").write_text(json.dumps(described))
    for file in base.rglob("chat_template.jinja"):
        file.unlink()
    path = run_file(world, tmp_path, model={"base": str(base)}, chat="template")
    assert faults(path) == [f"{base / 'language'}: the tokenizer has no chat template"]


def test_samples_that_are_skipped_are_named(world: Path, tmp_path: Path, said: Said) -> None:
    text = {"id": "short", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    long = {
        "id": "far too long",
        "conversations": [{"from": "human", "value": "x 1" * 300}, {"from": "gpt", "value": "b"}],
    }
    path = run_file(world, tmp_path, data=data(world, tmp_path, [long, text]), train={"too_long": "skip"})
    out = said(path)
    assert "1 more are skipped as too long: far too long" in out
    assert "1 samples, 0 with pictures" in out


def test_faults_of_all_kinds_are_found_together(world: Path, tmp_path: Path) -> None:
    good = rows(world)
    with_picture = next(row for row in good if "image" in row)
    question, answer = with_picture["conversations"][:2]
    bad = [
        with_picture,
        {**with_picture, "id": "gone", "image": "pictures/gone.png"},
        {**with_picture, "id": "none", "image": []},
        {
            **with_picture,
            "id": "long",
            "conversations": [
                {"from": "human", "value": IMAGE + "why? " * 600},
                {"from": "gpt", "value": "so"},
            ],
        },
        {
            **with_picture,
            "id": "again",
            "conversations": [question, answer, answer],
        },
    ]
    path = run_file(
        world,
        tmp_path,
        tune={"connector": {**LORA, "rank": 99}, "language": {**LORA, "targets": ["nothing.*"]}},
        data=data(world, tmp_path, bad),
        evaluate={"suite": "tinny"},
    )
    found = faults(path)
    line = path.read_text().split("\n").index("    rank: 99") + 1
    for place, what in [
        (f"{path}, line {line}, tune.connector.rank", "rank 99 is more than"),
        ("tune.language.targets", "'nothing.*' is no linear layer"),
        ("sample gone", "no such picture"),
        ("sample 2 (id none)", "but 0 pictures"),
        ("(id long)", "more than max_length 512"),
        ("(id again)", "turn 3 is the assistant's"),
        ("evaluate", "unknown suite 'tinny'"),
    ]:
        assert any(place in fault and what in fault for fault in found), (place, what, found)
    assert len(found) == 7


def test_a_faulty_config_does_not_hide_the_datas_faults(world: Path, tmp_path: Path) -> None:
    bad = [{"id": "a"}, *rows(world)[:3]]
    path = run_file(world, tmp_path, data=data(world, tmp_path, bad), train={"clip": -1, "max_length": 1})
    found = faults(path, "tune.language.rank=99", "sed=1")
    assert len(found) == 4, found
    for what in ("clip: expected more than 0", "'conversations' must be", "rank 99", "unknown key 'sed'"):
        assert any(what in fault for fault in found)


def test_the_prune_step_is_held_against_the_runs_length(world: Path, tmp_path: Path) -> None:
    path = run_file(world, tmp_path, tune={"language": {**SCULPT, "prune_at": 3}})
    (fault,) = faults(path)
    assert "tune.language.prune_at" in fault and "the run ends after 3" in fault
    check_run(path, ["train.steps=4"])


def test_broken_pictures_are_found_by_decoding(world: Path, tmp_path: Path) -> None:
    some = [row for row in rows(world) if "image" in row][:4]
    for row in some:
        target = tmp_path / row["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "datasets/tiny" / row["image"], target)
    broken = tmp_path / some[2]["image"]
    broken.write_bytes(broken.read_bytes()[:60])
    block = [{**data(world, tmp_path, some)[0], "image_root": str(tmp_path)}]
    path = run_file(world, tmp_path, data=block)
    (fault,) = faults(path)
    assert str(broken) in fault and "cannot be read" in fault
    check_run(path, pictures=0)


def test_parts_that_do_not_fit_are_found_without_weights(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    path = run_file(world, tmp_path, model={"base": str(base)})
    weights = base / "language" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (fault,) = faults(path)
    assert str(weights) in fault and "not a whole safetensors file" in fault
    shutil.copy(world / "base/language/model.safetensors", weights)
    config = base / "vision" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 24', '"hidden_size": 48'))
    (fault,) = faults(path)
    assert "it takes 24 and gives 32, but the tower is 48 wide" in fault


def test_what_the_evaluation_needs_is_looked_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    path = run_file(world, tmp_path, evaluate={"suite": "tiny"})
    check_run(path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(world / "datasets/tiny", elsewhere)
    pictures = sorted(elsewhere.rglob("*.png"))
    for picture in pictures:
        picture.unlink()
    found = faults(path, f"evaluate.root={elsewhere}")
    assert found
    assert all("pictures are missing, such as" in fault for fault in found)
    assert any("no such annotation file" in fault for fault in faults(path, f"evaluate.root={tmp_path}"))


@pytest.mark.parametrize("family", ["byte_level", "llama_first"])
def test_a_sample_is_shown_as_its_text(make_tokenizer: Any, family: str) -> None:
    chat = Chat(make_tokenizer(family, "llama3"), "template", 3)
    turns = [
        Turn("user", f"{IMAGE}What [b] is it?"),
        Turn("assistant", "né\n[INST]"),
        Turn("user", f"And {IMAGE}{IMAGE}?"),
        Turn("assistant", "\U0001f408"),
    ]
    ids, labels = chat.encode(turns)
    example = Example("a", np.array(ids, np.int32), np.array(labels, np.int32), ())
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = head.format("user"), head.format("assistant")
    expected = (
        f"<s>{user}<image x3>What [b] is it?<|eot_id|>{assistant}[[né\n[INST]<|eot_id|>]]"
        f"{user}And <image x3><image x3>?<|eot_id|>{assistant}[[\U0001f408<|eot_id|>]]"
    )
    assert show(example, chat, colours=False).plain == expected
    coloured = show(example, chat, colours=True)
    assert coloured.plain == expected.replace("[[", "").replace("]]", "")
    bright = [coloured.plain[span.start : span.end] for span in coloured.spans if "bold" in str(span.style)]
    assert bright == ["né\n[INST]<|eot_id|>", "\U0001f408<|eot_id|>"]


def without_weights(world: Path, tmp_path: Path) -> Path:
    """The YAML of a run for which there is nothing but a model's config.json, as of transformers."""
    config = {"vision_config": VISION, "text_config": {"model_type": "llama", **FAMILIES["llama"]}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    return run_file(
        world,
        tmp_path,
        model={"base": str(tmp_path / "model"), "dtype": "bfloat16"},
        data=[{"path": "/nowhere/train.json"}],
        tune={"connector": FULL, "language": SCULPT},
        evaluate={"suite": "forgetting"},
    )


def test_shapes_take_configs_alone(world: Path, tmp_path: Path, said: Said) -> None:
    path = without_weights(world, tmp_path)
    out = said(path, shapes=True)
    assert "lorasculpt" in out and "a picture is 4 tokens" in out
    assert "tokens (train.max_length, as no data was read) and 8 pictures at once" in out
    assert "Not checked, since only configs were read:" in out
    assert "data.0.path: there is no file /nowhere/train.json" in out
    assert "evaluation's annotation files" in out
    assert [line for line in faults(path) if "/nowhere/train.json" in line], "and without, they are faults"


def test_shapes_find_the_faults_that_configs_show(world: Path, tmp_path: Path) -> None:
    path = without_weights(world, tmp_path)
    changes = ["tune.language.targets=[nowhere]", "train.batch_size=0", "model.dtype=float64"]
    found = faults(path, *changes, shapes=True)
    assert len(found) == 2 and all("command line" in line for line in found)
    found = faults(path, *changes[:2], shapes=True)
    assert any("'nowhere' is no linear layer" in line for line in found) and len(found) == 2
    (unknown,) = faults(path, "model.base=llava-hf/llava-1.5-8b-hf", shapes=True)
    assert "neither a folder nor a model whose config is known here" in unknown
    assert any("prune_at is step 2" in line for line in faults(path, "train.steps=2", shapes=True))


def test_the_memory_is_told_for_the_longest_sample(world: Path, tmp_path: Path, said: Said) -> None:
    out = said(run_file(world, tmp_path))
    longest = re.search(r"tokens of a sample: .* (\d+) at most", out)
    assert longest and f"{longest[1]} tokens (the longest sample's)" in out
    assert "This run, one GPU, all activations kept:" in out and "fits." in out
    out = said(run_file(world, tmp_path), gpus=Gpus(processes=2, memory=0.25))
    assert "For 2 processes in float32, each with 4 samples" in out
    assert "ZeRO-3" in out and "does not fit" in out and "Nothing in the table does." in out


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file(world, tmp_path)
    assert main(["check", str(path), "--samples", "1", "--pictures", "5"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("no faults\n")
    assert out.count("\nsample ") == 1
    assert main(["check", str(path), "tune.language.rank=99", "train.clip=0"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mmtune: 2 faults\n")
    assert "command line, train.clip" in said.err and "command line, tune.language.rank" in said.err
    assert "no faults" not in said.out

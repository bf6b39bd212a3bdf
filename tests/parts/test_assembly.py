"""mmtune assemble: from parts to a model that sees, its tower and its language model untouched."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmtune.cli import main
from mmtune.core import table
from mmtune.core.errors import UserError
from mmtune.core.files import write_json
from mmtune.parts.assembly import Asked, assemble_folder
from mmtune.parts.model import VisionLanguageModel
from tests import tiny_models as tiny
from tests.world import metrics, run_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.save_tower(folder / "clip")
    tiny.save_tower(folder / "wide", hidden_size=32)
    tiny.save_language(folder / "lm")
    assemble_folder(asked(folder), folder / "model")
    return folder


def asked(folder: Path, **changes: str | None) -> Asked:
    given = {"vision": str(folder / "clip"), "connector": "linear", "language": str(folder / "lm"), **changes}
    return Asked(**given)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def connector_weight(folder: Path) -> torch.Tensor:
    return VisionLanguageModel.from_pretrained(folder).connector.get_parameter("linear.weight")


def test_a_language_model_gains_sight(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    tower, language = world / "base" / "vision", world / "base" / "language"
    before = weights(tower) | weights(language)
    out = tmp_path / "sighted"
    parts = [
        "--vision",
        str(tower),
        "--layer",
        "-1",
        "--connector",
        "mlp2x_gelu",
        "--language",
        str(language),
    ]
    assert main(["assemble", *parts, str(out)]) == 0
    said = capsys.readouterr().out
    assert f"mmtune train {out}/align.yaml" in said and "24 to 32" in said
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == [
        *("align.yaml", "config.json", "connector/config.json", "connector/model.safetensors")
    ]

    align = yaml.safe_load((out / "align.yaml").read_text())
    data = [{"card": "tiny_iconqa", "root": str(world / "datasets" / "tiny")}]  # each with a picture
    kept = {name: align[name] for name in ("model", "tune")}
    run = run_file(world, tmp_path, "aligned", data=data, train={"steps": 40}, **kept)
    assert main(["train", str(run), "tune.connector.lr=0.02"]) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "aligned")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    final = tmp_path / "aligned" / "final"
    assert not (final / "vision").exists() and not (final / "language").exists()
    assert weights(tower) | weights(language) == before
    new, trained = (load_file(each / "connector" / "model.safetensors") for each in (out, final))
    assert all(not torch.equal(new[name], trained[name]) for name in new)
    scores = ["--tasks", "tiny_colour", "--limit", "4", "--output_path", str(tmp_path / "scores")]
    assert main(["eval", "--model", str(final), *scores]) == 0


def test_the_same_seed_makes_the_same_connector_and_a_saved_one_stays(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assemble_folder(asked(folder), tmp_path / name, seed)
    a, b, c = (connector_weight(tmp_path / name) for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assemble_folder(asked(folder, connector=str(tmp_path / "c" / "connector")), tmp_path / "d")
    assemble_folder(asked(folder, connector=str(tmp_path / "c")), tmp_path / "e")
    d, e = (connector_weight(tmp_path / name) for name in "de")
    assert torch.equal(c, d) and torch.equal(c, e)


def test_a_part_of_a_base_is_replaced_alone(folder: Path, tmp_path: Path) -> None:
    assemble_folder(asked(folder, fit="squash"), tmp_path / "base")
    new = Asked(base=str(tmp_path / "base"), connector="resampler:{queries: 3, heads: 2, depth: 1}")
    assert assemble_folder(new, tmp_path / "resampled").image_tokens == 3
    config = json.loads((tmp_path / "resampled" / "config.json").read_text())
    assert config["vision"]["weights"] == str(Path("..") / ".." / folder.name / "clip")
    assert config["vision"]["fit"] == "squash"
    assert config["connector"]["options"] == {"queries": 3, "heads": 2, "depth": 1}
    with pytest.raises(UserError, match="it takes 24 and gives 32, but the tower is 32 wide"):
        assemble_folder(Asked(base=str(tmp_path / "base"), vision=str(folder / "wide")), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_happened_to_each_part_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["assemble", "--base", str(folder / "model"), "--vision", str(folder / "clip"), "a [b]c"]) == 0
    )
    said = capsys.readouterr().out
    assert "The connector is the base's, aligned with another vision part: train it." in said
    assert "  mmtune train 'a [b]c/align.yaml'\n" in said and "    a [b]c    " in said
    assert said.count("kept, from") == 2
    assert main(["assemble", "--base", "a [b]c", "--connector", "linear", "new"]) == 0
    said = capsys.readouterr().out
    assert "aligned with" not in said and " new " in said.partition("connector ")[2].partition("\n")[0]
    shutil.rmtree("new/connector")
    with pytest.raises(UserError, match=r"new/config\.json: there is no folder connector beside it"):
        VisionLanguageModel.from_pretrained("new")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"connector": None}, "--connector not given"),
        ({"vision": None, "layer": "-2"}, "--layer goes with --vision"),
        ({"language": None, "chat": "template"}, "--chat goes with --language"),
        (
            {"connector": "mlp2x_gelo"},
            "--connector: unknown connector 'mlp2x_gelo'\n *Did you mean 'mlp2x_gelu'",
        ),
        ({"connector": "resampler:{queries"}, "is neither a folder nor a kind of connector"),
        ({"connector": "resampler:{querie: 2}"}, "unknown option 'querie'"),
        ({"connector": "pixel_shuffle: {1: 2}"}, "unknown option '1'"),
        ({"vision": "LM"}, "no tower is known to take a model of type llama\n *Say which with --tower"),
        ({"connector": "CLIP"}, "not the config of a connector that mmtune saved"),
        ({"language": "CLIP"}, "a clip_vision_model is no causal language model"),
        ({"language": "CLIP/../nowhere"}, "nowhere: no such folder"),
        ({"vision": "./nowhere"}, "nowhere: no such folder"),
        ({"vision": "WIDE", "connector": "SAVED"}, r"32 wide (?s:.*)mmtune assemble: --connector linear$"),
        ({"vision": "PART"}, "this is a part 'connector', not 'vision'"),
        ({"connector": "nowhere.at:All"}, "model.connector.kind: there is no module nowhere"),
    ],
)
def test_what_the_command_refuses(folder: Path, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    places = {"LM": folder / "lm", "CLIP": folder / "clip", "WIDE": folder / "wide"}
    places |= {
        "SAVED": folder / "model" / "connector",
        "PART": tmp_path,
        "CLIP/../nowhere": folder / "nowhere",
    }
    changes = {name: str(places.get(value, value)) if value else value for name, value in changes.items()}
    write_json(tmp_path / "part.json", {"part": "connector", "kind": "linear"})
    with pytest.raises(UserError, match=said):
        assemble_folder(asked(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["assemble", "check"])
def test_code_that_a_language_model_brings_along_is_not_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(folder / "lm", evil)
    code = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own", "AutoTokenizer": ["code.Own", None]}
    for name in ("config.json", "tokenizer_config.json"):
        own = {"model_type": "own", "tokenizer_class": "Own", "auto_map": code}
        write_json(evil / name, {**json.loads((evil / name).read_text()), **own})
    (evil / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    parts = ["--vision", str(folder / "clip"), "--connector", "linear"]
    asked = {"check": ["check"], "assemble": ["assemble", *parts, str(tmp_path / "out")]}[command]
    assert main([*asked, "--language", str(evil)]) == 2
    said = capsys.readouterr()
    assert "it needs code that it brings along, which mmtune does not run" in said.err
    assert "trust_remote_code" not in said.out + said.err and not ran.exists()


def test_a_folder_is_never_overwritten_nor_a_saved_part_s_code_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_allowed", set())
    with pytest.raises(UserError, match="this is there already"):
        assemble_folder(asked(folder), tmp_path)
    described = {"kind": "os.path:Evil", "vision_width": 24, "language_width": 32}
    write_json(tmp_path / "connector" / "config.json", described)
    with pytest.raises(UserError, match=r"code outside mmtune, os\.path:Evil"):
        assemble_folder(asked(folder, connector=str(tmp_path / "connector")), tmp_path / "out")
    for part, option in (("vision", "tower"), ("connector", "kind")):
        write_json(tmp_path / part / "part.json", {"part": part, option: "os.path:Evil"})
        with pytest.raises(UserError, match=r"part\.json: it names code outside mmtune, os\.path:Evil"):
            assemble_folder(asked(folder, **{part: str(tmp_path / part)}), tmp_path / "out")

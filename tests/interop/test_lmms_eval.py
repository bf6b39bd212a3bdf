"""The lmms-eval plug-in: alone, with a stand-in for the two classes it needs, and under lmms-eval itself."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.evaluation.evaluate import evaluate
from mmtune.evaluation.protocol import load_protocol
from mmtune.training.loop import train
from tests.test_layers import PACKAGE, imports
from tests.world import FROZEN, LORA, run_options

ROOT = PACKAGE.parent
TASKS = ["tiny_reading", "tiny_colour", "tiny_text"]
INSTALLED = find_spec("lmms_eval") is not None


@dataclass
class Request:
    """lmms-eval's Instance, as far as a model sees it."""

    args: tuple[Any, ...]
    task_name: str


@dataclass
class Result:
    """lmms-eval's GenerationResult, which carries an answer."""

    text: Any


class Driver:
    """lmms-eval's model class, as far as a model builds on it."""

    def __init__(self) -> None:
        self.rank = 0
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in's module, built on the stand-in."""
    stand_ins: dict[str, dict[str, type]] = {
        "instance": {"Instance": Request, "GenerationResult": Result},
        "model": {"lmms": Driver},
    }
    for name, held in stand_ins.items():
        module = ModuleType(f"lmms_eval.api.{name}")
        for key, value in held.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, f"lmms_eval.api.{name}", module)
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "mmtune.interop.lmms_eval", raising=False)
    yield importlib.import_module("mmtune.interop.lmms_eval")
    sys.modules.pop("mmtune.interop.lmms_eval")


def requests_for(model: Any, tasks: list[str], **said: Any) -> tuple[list[Request], list[str]]:
    """What lmms-eval would ask `model`, with its documents put where they belong; and the questions' ids."""
    requests, ids = [], []
    for task in tasks:
        protocol = load_protocol(task)
        questions = protocol.questions()[0]
        model.task_dict[task] = {"test": questions}
        for number, question in enumerate(questions):
            text = protocol.turns(question)[0].text.removeprefix("<image>\n")
            asked = {"max_new_tokens": protocol.max_new_tokens, **said}
            shown = [Image.open(protocol.root / protocol.images / image) for image in question.images]
            requests.append(Request((text, asked, lambda _, shown=shown: shown, number, task, "test"), task))
            ids.append(question.id)
    return requests, ids


def answers_of(folder: Path, tasks: list[str]) -> list[str]:
    rows = [(folder / f"samples_{task}.jsonl").read_text().splitlines() for task in tasks]
    return [json.loads(row)["prediction"] for several in rows for row in several]


@pytest.mark.parametrize("batch_size", ["1", 5])
def test_answers_are_those_of_mmtune_eval(
    plugin: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | str
) -> None:
    monkeypatch.chdir(world)
    evaluate(Path("base"), TASKS, tmp_path, batch_size=3)
    expected = answers_of(tmp_path, TASKS)
    assert len(set(expected)) > 8
    model = plugin.MmtuneModel("base", batch_size=batch_size, device="cpu")
    requests, _ = requests_for(model, TASKS, temperature=0, top_p=1.0, num_beams=1, do_sample=False)
    assert model.generate_until(requests) == expected


def test_an_answer_ends_before_a_stop_string(
    plugin: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    model = plugin.MmtuneModel("base", batch_size=4, device="cpu")
    whole = model.generate_until(requests_for(model, ["tiny_colour"])[0])
    stop = max(whole, key=len)[3:5]
    expected = [answer.partition(stop)[0].strip() for answer in whole]
    assert expected != whole
    for until in (stop, ["never said", stop]):
        assert model.generate_until(requests_for(model, ["tiny_colour"], until=until)[0]) == expected


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"temperature": 0.2}, "temperature 0.2: mmtune decodes greedily.*temperature=0"),
        ({"do_sample": True}, "do_sample=True: mmtune decodes greedily"),
        ({"num_beams": 3}, "num_beams=3: mmtune decodes greedily.*num_beams=1"),
        ({"visual_cot": True}, "visual_cot=True is unknown"),
    ],
)
def test_no_other_decoding(
    plugin: Any, world: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], complaint: str
) -> None:
    monkeypatch.chdir(world)
    model = plugin.MmtuneModel("base", device="cpu")
    with pytest.raises(UserError, match=f"(?s){complaint}"):
        model.generate_until(requests_for(model, ["tiny_text"], **said)[0])
    harmless = requests_for(model, ["tiny_text"], temperature=0.7, do_sample=False)[0][:1]
    assert len(model.generate_until(harmless)) == 1


def test_what_it_cannot_show_is_said(plugin: Any, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    model = plugin.MmtuneModel("base", device="cpu")
    (first, *_), _ = requests_for(model, ["tiny_colour"])
    text, said, _, *rest = first.args
    path = sorted(Path("datasets/tiny/images/test").glob("*.png"))[0]
    cases: list[tuple[str, list[Any], str]] = [
        (text, ["talk.mp4"], "shows str talk.mp4: mmtune takes pictures alone"),
        (text, [{"array": 0}], "shows dict"),
        (f"<image>\n{text}", [], "1 times <image> for 0 pictures"),
        ("long " * 600, [], "the model's context has 512"),
    ]
    for asked, visuals, complaint in cases:
        request = Request((asked, said, lambda _, visuals=visuals: visuals, *rest), "tiny_colour")
        with pytest.raises(UserError, match=complaint):
            model.generate_until([request])
    alike = [Request((text, said, lambda _, shown=shown: [shown], *rest), "") for shown in (path, str(path))]
    opened = Request((text, said, lambda _: [Image.open(path)], *rest), "")
    assert len(set(model.generate_until([*alike, opened]))) == 1
    with pytest.raises(UserError, match="batch size 'auto'"):
        plugin.MmtuneModel("base", batch_size="auto")


def test_likelihoods_are_those_of_mmtune_eval(
    plugin: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    evaluate(Path("base"), ["tiny_iconqa"], tmp_path, decode="likelihood")
    rows = [json.loads(line) for line in (tmp_path / "samples_tiny_iconqa.jsonl").read_text().splitlines()]
    model = plugin.MmtuneModel("base", batch_size=5, device="cpu")
    asked, _ = requests_for(model, ["tiny_iconqa"])
    questions = model.task_dict["tiny_iconqa"]["test"]
    protocol = load_protocol("tiny_iconqa")
    requests, expected = [], []
    for request, question, row in zip(asked, questions, rows, strict=True):
        text, _, *rest = request.args
        for option in protocol.candidates(question):
            requests.append(Request((text, f" {option}", *rest), "tiny_iconqa"))
        expected += [-value for value in row["loglikelihood"]]
    found = model.loglikelihood(requests)
    assert [result.text[0] for result in found] == pytest.approx(expected, abs=2e-4)


def test_what_greedy_decoding_says_is_greedy(
    plugin: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    model = plugin.MmtuneModel(str(share("data") / "tiny" / "model"), batch_size=3, device="cpu")
    asked = requests_for(model, ["tiny_colour"])[0]
    said = model.generate_until(asked)
    for end, expected in (("", True), ("er", False)):
        # lmms-eval hands over a text, or a function of the document.
        requests = [
            Request((request.args[0], lambda _, text=text + end: text, *request.args[2:]), "")
            for request, text in zip(asked, said, strict=True)
        ]
        assert [result.text[1] for result in model.loglikelihood(requests)] == [expected] * len(said)


def test_the_entry_point_and_nothing_else_leads_here() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert (
        setup["options.entry_points"]["lmms_eval.models"].strip()
        == "mmtune = mmtune.interop:lmms_eval_models"
    )
    assert "mmtune.interop" in setup["options"]["packages"].split()
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in imports(path) if name in ("interop", "interop.lmms_eval")}, path


# ---- Under lmms-eval ------------------------------------------------------------------------------------

UTILS = """
from PIL import Image
from lmms_eval.tasks.textvqa.utils import textvqa_process_results


def visual(doc):
    return [Image.open(doc["image"])] if doc["image"] else []


def score_reading(doc, results):
    return {"exact_match": textvqa_process_results(doc, results)["exact_match"]}
"""
# As lmms-eval's own gqa.yaml and textvqa_val.yaml score.
METRIC = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
LOOSE = {**METRIC, "ignore_case": True, "ignore_punctuation": True}
# What of its results.json is about lmms-eval itself.
ONLY_THEIRS = """lmms_eval_version git_branch usage efficiency throughput start_time end_time
system_instruction system_instruction_sha fewshot_as_multiturn chat_template chat_template_sha""".split()


def write_tasks(folder: Path, root: Path) -> None:
    """The three tasks as lmms-eval wants its own: a YAML and the documents of each, and functions."""
    import yaml

    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)
    for task in TASKS:
        protocol = load_protocol(task)
        docs = [
            {
                "question_id": question.id,
                "prompt": protocol.turns(question)[0].text.removeprefix("<image>\n"),
                "answer": question.answers[0],
                "answers": list(question.answers),
                "image": str(root / question.image) if question.image else "",
            }
            for question in protocol.questions()[0]
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        described = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": protocol.max_new_tokens, "until": []},
            "metric_list": [LOOSE if task == "tiny_colour" else METRIC],
        }
        text = yaml.safe_dump(described) + "doc_to_visual: !function utils.visual\n"
        if task == "tiny_reading":
            text += "process_results: !function utils.score_reading\n"
        (folder / f"{task}.yaml").write_text(text)


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install mmtune[lmms-eval]")
def test_lmms_eval_gives_our_answers_and_scores(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.baselines import load_baseline
    from lmms_eval.models import get_model_manifest

    assert get_model_manifest("mmtune").simple_class_path == "mmtune.interop.lmms_eval.MmtuneModel"
    monkeypatch.chdir(world)
    tiny = (world / "datasets" / "tiny").resolve()
    changes: dict[str, Any] = {  # it forgets, but not everything
        "model": {"base": str(share("data") / "tiny" / "model")},
        "data": [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}],
        "tune": {"vision": FROZEN, "connector": FROZEN, "language": {**LORA, "lr": 0.018}},
        "train": {"steps": 8},
    }
    train(run_options(world, tmp_path, **changes))
    final = tmp_path / "run" / "final"
    assert (final / "adapter" / "language").is_dir()
    ours = evaluate(final, TASKS, tmp_path / "ours", batch_size=4)
    write_tasks(tmp_path / "tasks", tiny)
    command = [sys.executable, "-m", "lmms_eval", "--model", "mmtune", "--model_args", f"pretrained={final}"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path / "tasks"), "--batch_size", "5"]
    command += ["--output_path", str(tmp_path / "theirs"), "--log_samples", "--device", "cpu"]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (results,) = (tmp_path / "theirs").rglob("*_results.json")
    theirs = json.loads(results.read_text())
    for task in TASKS:
        prefix = results.name.removesuffix("results.json")
        lines = results.with_name(f"{prefix}samples_{task}.jsonl").read_text().splitlines()
        rows = sorted(map(json.loads, lines), key=lambda row: row["doc_id"])
        assert [row["filtered_resps"] for row in rows] == answers_of(tmp_path / "ours", [task])
        score = ours["results"][task]
        assert theirs["results"][task]["exact_match,none"] == pytest.approx(score[f"{score['metric']},none"])
    points = [ours["results"][task]["score"] for task in TASKS]
    assert min(points) < 100 and max(points) > 0, points  # neither all right nor all wrong
    assert ours["versions"].keys() == theirs["versions"].keys()
    assert theirs.keys() - ours.keys() <= set(ONLY_THEIRS)
    for task in TASKS:
        scores, _ = load_baseline(str(tmp_path / "ours" / f"samples_{task}.jsonl"), task)
        assert list(scores) == list(range(12))
        assert sum(scores.values()) / 12 == pytest.approx(ours["results"][task]["score"] / 100)

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.evaluation.compare import compare, match, print_comparison
from mmtune.evaluation.folders import Row, open_folder
from mmtune.evaluation.significance import holm, paired
from tests.made_up_runs import level, rewrite, write_evaluation

SUFFIX = "\nAnswer the question using a single word or phrase."


def ours(folder: Path, scores: dict[str, list[float]], suffix: str = SUFFIX, **changes: Any) -> Path:
    """As mmtune eval writes it; two questions a picture."""
    folder.mkdir(parents=True)
    results: dict[str, dict[str, Any]] = {}
    for task, values in scores.items():
        rows = [
            {
                "question_id": str(1000 + i),
                "prediction": "a",
                "score": score,
                "cluster": f"picture {i // 2}",
                "prompt": f"<image>\nWhat is {i}?{suffix}",
            }
            for i, score in enumerate(values)
        ]
        write_rows(folder / f"samples_{task}.jsonl", rows)
        results[task] = {"score": 100 * float(np.mean(values)), "stderr": 2.0, "n": len(values), "missing": 0}
        results[task] |= {"rule": "m4c", "metric": "vqa_accuracy", "unit": "%"}
    written: dict[str, Any] = {
        "results": results,
        "configs": {task: {"hash": "h", "max_new_tokens": 16} for task in scores},
    }
    written |= {"precision": "float32", "batch_size": 32, "limit": None, "splits": {}, "data": {}}
    (folder / "results.json").write_text(json.dumps({**written, **changes}))
    return folder


def theirs(
    folder: Path,
    task: str,
    scores: list[float],
    ids: bool = True,
    samples: bool = True,
    pictures: bool = False,
) -> Path:
    """As lmms-eval 0.7.3 writes it with --log_samples: no doc, the ids in what a metric carries along."""
    place = folder / "llava-hf__llava-1.5-7b-hf"
    place.mkdir(parents=True)
    results = {
        "results": {
            task: {
                "alias": task,
                "exact_match,none": float(np.mean(scores)),
                "exact_match_stderr,none": 0.02,
                "submission,none": None,
                "submission_stderr,none": "N/A",
            }
        },
        "configs": {task: {"dataset_path": "lmms-lab/textvqa", "test_split": "validation"}},
        "n-samples": {task: {"original": len(scores), "effective": len(scores)}},
        "config": {"model": "llava_hf", "model_args": "pretrained=x,dtype=bfloat16", "batch_size": "1"},
        "lmms_eval_version": "0.7.3",
    }
    rows = [
        {
            "doc_id": i,
            "target": "['a']",
            "filtered_resps": ["a"],
            "doc_hash": f"{i:x}",
            "exact_match": score,
            "submission": {"question_id": 1000 + i, "answer": "a"} if ids else None,
            "input": f"What is {i}?{SUFFIX}",
        }
        for i, score in enumerate(scores)
    ]
    for i, row in enumerate(rows if pictures else []):
        row["input_media"] = [f"/data/{i // 2}.png"]
    (place / "20261121_101010_results.json").write_text(json.dumps(results))
    if samples:
        write_rows(place / f"20261121_101010_samples_{task}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def vqa(seed: int, n: int = 60) -> list[float]:
    return np.random.default_rng(seed).choice([0.0, 0.3, 0.6, 0.9, 1.0], n).tolist()


def printed(report: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=100)
    print_comparison(report, console)
    return " ".join(console.file.getvalue().replace("│", " ").split())  # type: ignore[attr-defined]


def test_two_of_ours(tmp_path: Path) -> None:
    a = ours(tmp_path / "a", {"s": vqa(1), "t": vqa(2)})
    b = ours(tmp_path / "b", {"s": vqa(3), "t": vqa(4), "only here": [1.0]})
    report = compare(a, b, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == report
    assert list(report["tasks"]) == ["s", "t"]
    row = report["tasks"]["s"]
    wanted = paired([y - x for x, y in zip(vqa(1), vqa(3), strict=True)], [str(i // 2) for i in range(60)])
    assert {key: row[key] for key in wanted} == wanted
    assert (row["matched_by"], row["only_a"], row["only_b"]) == ("question id", 0, 0)
    flips = [(x >= 0.5) - (y >= 0.5) for x, y in zip(vqa(1), vqa(3), strict=True)]
    assert row["flips"] == {"right_to_wrong": flips.count(1), "wrong_to_right": flips.count(-1)}
    assert [each["p_holm"] for each in report["tasks"].values()] == holm(
        [each["p"] for each in report["tasks"].values()]
    )
    assert "WARNING" not in printed(report)


def test_exchanging_the_sides_turns_the_signs(tmp_path: Path) -> None:
    a, b = ours(tmp_path / "a", {"s": vqa(1)}), theirs(tmp_path / "b", "s", vqa(2))
    there, back = (compare(*pair)["tasks"]["s"] for pair in ((a, b), (b, a)))
    assert back["difference"] == pytest.approx(-there["difference"])
    assert back["ci95"] == pytest.approx([-there["ci95"][1], -there["ci95"][0]])
    assert back["p"] == there["p"]
    assert back["flips"]["right_to_wrong"] == there["flips"]["wrong_to_right"]


@pytest.mark.parametrize(("ids", "by"), [(True, "question id"), (False, "place in the data set")])
def test_ours_and_lmms_evals(tmp_path: Path, ids: bool, by: str) -> None:
    a, b = ours(tmp_path / "a", {"textvqa": vqa(1)}), theirs(tmp_path / "b", "textvqa_val", vqa(2), ids)
    with pytest.raises(UserError, match="no task is in both: textvqa against textvqa_val"):
        compare(a, b)
    report = compare(a, b, ["textvqa=textvqa_val"])
    row = report["tasks"]["textvqa=textvqa_val"]
    wanted = paired([y - x for x, y in zip(vqa(1), vqa(2), strict=True)], [str(i // 2) for i in range(60)])
    assert {key: row[key] for key in wanted} == wanted  # the pictures are known from our side
    assert row["matched_by"] == by
    assert row["b"]["score"] == pytest.approx(100 * np.mean(vqa(2)))
    made = row["made"]
    assert made["precision"] == {"a": "float32", "b": "bfloat16", "same": False}
    assert made["batch size"] == {"a": "32", "b": "1", "same": False}
    assert made["longest answer"] == {"a": "16", "b": None, "same": None}
    assert made["prompt"]["same"] is True
    text = printed(report)
    assert (
        "WARNING: textvqa=textvqa_val: not made in the same way (rule, metric, batch size, precision)" in text
    )
    assert "only one side says its longest answer, split, data set" in text and "lmms-eval 0.7.3" in text


def test_two_of_lmms_evals_know_no_picture(tmp_path: Path) -> None:
    report = compare(
        theirs(tmp_path / "a", "gqa", vqa(1), False), theirs(tmp_path / "b", "gqa", vqa(2), False)
    )
    row = report["tasks"]["gqa"]
    assert (row["paired"], row["clustered"], row["clusters"]) == (True, False, 60)
    assert "questions count as independent" in printed(report)
    sides = [theirs(tmp_path / side, "gqa", vqa(i), False, pictures=True) for i, side in enumerate("cd")]
    row = compare(sides[0], sides[1])["tasks"]["gqa"]
    assert (row["clustered"], row["clusters"]) == (True, 30)
    assert row["matched_by"] == "picture and question"


def test_another_prompt_is_said_loudly(tmp_path: Path) -> None:
    a, b = ours(tmp_path / "a", {"s": vqa(1)}), ours(tmp_path / "b", {"s": vqa(1)}, suffix="\nBe brief.")
    report = compare(a, b)
    prompt = report["tasks"]["s"]["made"]["prompt"]
    assert (prompt["same"], prompt["differ"]) == (False, 60)
    assert "not made in the same way (prompt)" in printed(report)


def test_a_limit_leaves_questions_without_partner(tmp_path: Path) -> None:
    a, b = ours(tmp_path / "a", {"s": vqa(1)}), ours(tmp_path / "b", {"s": vqa(2)[:20]}, limit=20)
    report = compare(a, b)
    row = report["tasks"]["s"]
    assert (row["n"], row["only_a"], row["only_b"]) == (20, 40, 0)
    assert row["a_paired"] == pytest.approx(100 * np.mean(vqa(1)[:20]))
    assert row["difference"] == pytest.approx(row["b_paired"] - row["a_paired"])
    assert "40 questions of A and 0 of B have no partner" in printed(report)


def test_without_samples_or_partners_it_is_unpaired_and_says_so(tmp_path: Path) -> None:
    a = ours(tmp_path / "a", {"s": vqa(1)})
    report = compare(a, theirs(tmp_path / "b", "s", vqa(2), samples=False))
    row = report["tasks"]["s"]
    assert row["paired"] is False and row["b"]["n"] == 60
    assert row["difference"] == pytest.approx(100 * np.mean(vqa(2)) - 100 * np.mean(vqa(1)))
    assert row["stderr"] == pytest.approx((2.0**2 + 2.0**2) ** 0.5)
    assert "unpaired, for there are no scores of single questions of B" in printed(report)
    other = ours(tmp_path / "c", {"s": vqa(2)})
    path = other / "samples_s.jsonl"
    path.write_text(path.read_text().replace("What is", "Where was"))
    assert "could not be matched" in compare(a, other)["tasks"]["s"]["matching"]


def test_mistakes_are_answered_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = ours(tmp_path / "a", {"s": vqa(1)})
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([str(a), str(tmp_path / "none")], "no such folder"),
        ([str(a), str(tmp_path / "empty")], "neither results.json nor a *_results.json of lmms-eval"),
        ([str(a), str(a), "--task", "x=s"], "it has no task 'x'"),
    ):
        assert main(["compare", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", str(a), str(a), "--output_path", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "compare.json").is_file()
    (theirs(tmp_path / "b", "s", vqa(1)) / "another").mkdir()
    one = next((tmp_path / "b").glob("*/*_results.json"))
    (tmp_path / "b" / "another" / one.name).write_text(one.read_text())
    with pytest.raises(UserError, match="several models"):
        open_folder(tmp_path / "b")
    rewrite(a / "results.json", results={"s": {"score": 3, "stderr": None, "n": 60}})
    with pytest.raises(UserError, match="another mean"):
        compare(a, a)


def test_the_evaluations_that_reports_read_are_compared_too(tmp_path: Path) -> None:
    for name, at in (("a", 90), ("b", 60)):
        write_evaluation(tmp_path / name, level(at, 50), seed=at)
    report = compare(tmp_path / "a", tmp_path / "b")
    assert report["tasks"]["tiny_text"]["difference"] < -10
    assert report["tasks"]["tiny_text"]["matched_by"] == "question id"  # and no prompt to read


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.randoms())
def test_matching_takes_the_right_partners_in_any_order(asked: list[int], random: Any) -> None:
    a = [Row(0.0, f"Is it {q}?", i, None, None, None) for i, q in enumerate(asked)]
    b = [Row(1.0, f"Is it {q}?\nBriefly.", i, None, None, None) for i, q in enumerate(asked)]
    random.shuffle(b)
    pairs, by, _ = match(a, b)
    assert by == "place in the data set"
    assert sorted(mine.index for mine, _ in pairs) == list(range(len(asked)))
    assert all(mine.index == its.index for mine, its in pairs)


def test_no_caption_is_lost_or_won(tmp_path: Path) -> None:
    folders = []
    for name, scores in (("a", [0.4, 1.2, 0.7]), ("b", [0.6, 0.3, 1.9])):
        folders.append(ours(tmp_path / name, {"coco": scores}))
        path = folders[-1] / "results.json"
        path.write_text(path.read_text().replace('"unit": "%"', '"unit": "CIDEr x 100"'))
    row = compare(folders[0], folders[1])["tasks"]["coco"]
    assert "flips" not in row and row["difference"] == pytest.approx(100 * 0.5 / 3)

"""Forgetting against gain: finished evaluations compared, as report.json, frontier.png and report.html."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.core.config import Source
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, read_jsonl, write_json
from mmtune.evaluation.answers import answer_forms, flips, loss_parts, over_seeds
from mmtune.evaluation.attribution import (
    attribution_gaps,
    attribution_group,
    attribution_row,
    read_attribution,
)
from mmtune.evaluation.browser import pictures_in_order, rows_to_show
from mmtune.evaluation.differences import between, changes
from mmtune.evaluation.examples import choose_examples
from mmtune.evaluation.forgetting import (
    SUMMARIES,
    Answers,
    Evaluation,
    check_comparable,
    ci95,
    group_by_config,
    mean_sd,
    paired_drop,
    read_evaluation,
    retention,
    score_of,
    seed_mean,
    series_of,
    stderr_of_mean,
    summary,
)
from mmtune.evaluation.frontier import draw_frontier
from mmtune.evaluation.metrics.base import field, some
from mmtune.evaluation.page import write_page
from mmtune.evaluation.provenance import made_by, prompts
from mmtune.evaluation.scales import read_scales, scale_group, scale_rows
from mmtune.evaluation.thumbnails import BUDGET, make_thumbnails

if TYPE_CHECKING:
    from mmtune.evaluation.protocol import Suite


def make_report(
    base: Path, runs: Sequence[Path], suite: Suite, split: str | None, output: Path, thumbnails: int = BUDGET
) -> dict[str, Any]:
    """Compares finished runs with their base on a suite; writes report.json, frontier.png and report.html to
    `output`.

    `base` and each run hold their evaluation under eval/SUITE-SPLIT (see Suite.folder). thumbnails: the bytes
    that the pictures in report.html may take. Raises UserError
    for evaluations that are missing (with the commands that make them) or cannot be compared, for runs that
    started from another model than the base, and for the same run twice.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"several runs of one name: {', '.join(twice)}", mend="Rename one of the folders.")
    _check_complete(base, runs, suite, split)
    place = suite.folder(split)
    baseline = read_evaluation(base / place, suite.tasks)
    evaluations = {
        name: read_evaluation(run / place, suite.tasks) for name, run in zip(names, runs, strict=True)
    }
    check_comparable(baseline, evaluations)
    configs = {name: _read_config(run) for name, run in zip(names, runs, strict=True)}
    trained = {name: read_json(run / "final" / "trained.json") for name, run in zip(names, runs, strict=True)}
    _check_models(baseline, evaluations, trained)
    hashes = {
        key: {name: field(trained[name], key, str, f"{name}/final/trained.json") for name in names}
        for key in ("config", "data")
    }
    rows = {name: _run_row(name, baseline, evaluations[name], suite) for name in names}
    restored: dict[str, Evaluation] = {}
    for name, run in zip(names, runs, strict=True):
        found = read_attribution(run, evaluations[name], baseline, suite, split)
        restored |= {f"{name} with {part} put back": evaluation for part, evaluation in found.items()}
        rows[name] |= {"attribution": attribution_row(found, suite)} if found else {}
        rows[name] |= {"tuner": _language_tuner(configs[name]), "seed": configs[name]["seed"]}
        scaled = read_scales(run, evaluations[name], baseline, suite, split)
        restored |= {f"{name} at scale {scale:g}": evaluation for scale, evaluation in scaled.items()}
        rows[name] |= {"scales": scale_rows(scaled, suite)} if scaled else {}
        densities = _last_densities(run / "metrics.jsonl")
        rows[name] |= {"density": densities} if densities else {}
        rows[name] |= {"made_by": made_by(evaluations[name].folder)}
    groups, gaps = [], []
    means: dict[str, dict[str, Answers]] = {}
    for label, members in group_by_config(configs, hashes["data"]):
        for name in members:
            rows[name]["label"] = label
        answers = [evaluations[name].answers for name in members]
        means[label] = {task: seed_mean([each[task] for each in answers], task) for task in suite.tasks}
        groups.append(_group_row(label, [rows[name] for name in members], baseline, means[label], suite))
        gaps += attribution_gaps(label, [rows[name] for name in members])
    warnings = _warnings(baseline, evaluations, trained, restored) + gaps
    report = {
        "base": {
            **_model_row(_name_of(base), baseline, suite),
            "format": answer_forms(baseline.answers, baseline.answers, suite.source, suite.target),
            "made_by": made_by(baseline.folder),
        },
        "runs": list(rows.values()),
        "groups": groups,
        "between": between(
            means,
            {group["label"]: [rows[name] for name in group["runs"]] for group in groups},
            suite.source,
            suite.target,
        ),
        "series": series_of(
            {
                group["label"]: {**configs[group["runs"][0]], "data_hash": hashes["data"][group["runs"][0]]}
                for group in groups
            }
        ),
        "warnings": warnings,
        "files": {name: str(output / name) for name in ("report.json", "frontier.png", "report.html")},
        "made_with": {
            "suite": suite.name,
            "split": split or "test",
            "splits": baseline.splits,
            "source": list(suite.source),
            "target": list(suite.target),
            **baseline.made_with,
            "decoding": baseline.decoding,
            "limit": baseline.limit,
            "protocols": baseline.protocols,
            "annotations": baseline.data,
            **hashes,
            "commit": {name: trained[name].get("commit") for name in names},
            "tasks": prompts(baseline.folder, suite.tasks),
            "command": _command(base, runs, suite, split, output),
        },
    }
    firsts = {group["label"]: evaluations[group["runs"][0]].folder for group in groups}
    shown = rows_to_show(baseline.folder, firsts, suite.tasks)
    examples = {task: choose_examples(rows.before, rows.after) for task, rows in shown.items()}
    pictures = make_thumbnails(pictures_in_order(shown, examples), thumbnails)
    warnings += pictures.warnings()
    write_json(output / "report.json", report)
    draw_frontier(report, output / "frontier.png")
    write_page(report, examples, shown, pictures, output / "report.html")
    return report


def _command(base: Path, runs: Sequence[Path], suite: Suite, split: str | None, output: Path) -> str:
    words = ["mmtune", "report", "--base", base, *runs, "--suite", suite.path or suite.name]
    words += ["--split", split] if split else []
    return shlex.join(map(str, [*words, "--output_path", output]))


def _check_complete(base: Path, runs: Sequence[Path], suite: Suite, split: str | None) -> None:
    faults = []
    place = suite.folder(split)
    for folder in (base, *runs):
        if folder is not base and not (folder / "final" / "trained.json").is_file():
            faults.append(
                Fault(
                    "this is no finished run: it has no final/trained.json",
                    str(folder),
                    "Give the run's folder, runs/NAME; mmtune train --resume finishes one.",
                )
            )
        elif not (folder / place / "results.json").is_file():
            holds_model = folder is not base or (folder / "config.json").is_file()
            model = (
                folder / "final" if (folder / "final").is_dir() else folder if holds_model else "BASE_MODEL"
            )
            command = f"mmtune eval --model {model} --suite {suite.path or suite.name}"
            command += f" --output_path {folder / place}"
            command += f" --split {split}" if split not in (None, "test") else ""
            what = f"there is no {place / 'results.json'}: it is not evaluated on suite {suite.name}"
            faults.append(Fault(what, str(folder), f"Run: {command}"))
    if faults:
        raise UserError.of(faults)


def _check_models(
    base: Evaluation, runs: Mapping[str, Evaluation], trained: Mapping[str, dict[str, Any]]
) -> None:
    """Raises UserError for a run that started from another model than the base, or has scores of another."""
    faults = []
    for name, run in runs.items():
        start, end = trained[name].get("base"), trained[name].get("model_hash")
        if start not in (None, base.model_hash):
            faults.append(
                Fault(
                    f"it started from model {start}, but the base is model {base.model_hash} ({base.model})",
                    name,
                    "Give --base the evaluation of the model that the run started from.",
                )
            )
        if end not in (None, run.model_hash):
            faults.append(
                Fault(
                    f"its final model is {end}, but {run.model_hash} ({run.model}) was evaluated",
                    name,
                    "Evaluate the run again.",
                )
            )
    if faults:
        raise UserError.of(faults)


def _name_of(base: Path) -> str:
    folder = base.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "run.yaml"
    config = Source(path).tree
    if not isinstance(config, dict):
        raise UserError("expected a mapping", where=path)
    return {"seed": 0, **config}


def _language_tuner(config: Mapping[str, Any]) -> str:
    """Of the last stage, where there are several."""
    last = config["stages"][-1] if config.get("stages") else config
    return str(last.get("tune", {}).get("language", {}).get("tuner", "frozen"))


def _last_densities(metrics: Path) -> dict[str, float]:
    if not metrics.is_file():
        return {}
    lines = [line for _, line in read_jsonl(metrics)]
    return {key: value for line in lines for key, value in line.items() if key.startswith("density")}


def _model_row(name: str, evaluation: Evaluation, suite: Suite) -> dict[str, Any]:
    scores = evaluation.scores
    row: dict[str, Any] = {"name": name, "scores": scores}
    row |= summary({task: scores[task]["score"] for task in scores}, suite.source, suite.target)
    for which, tasks in (("source", suite.source), ("target", suite.target)):
        stderr = stderr_of_mean([scores[task]["stderr"] for task in tasks])
        row |= {f"{which}_stderr": stderr, f"{which}_ci95": ci95(row[which], stderr)}
    return row


def _run_row(name: str, base: Evaluation, run: Evaluation, suite: Suite) -> dict[str, Any]:
    drops = {task: paired_drop(base.answers[task], run.answers[task], task) for task in suite.source}
    lost, lost_ci95 = loss_parts(base.answers, run.answers, suite.source)
    return _model_row(name, run, suite) | {
        "drop": {task: drop for task, (drop, _) in drops.items()},
        "drop_ci95": {task: ci95(*drop) for task, drop in drops.items()},
        "retention": {
            task: retention(base.scores[task]["score"], run.scores[task]["score"]) for task in suite.source
        },
        "change": changes(base.answers, run.answers, suite.source, suite.target),
        "flips": flips(base.answers, run.answers),
        "format": answer_forms(base.answers, run.answers, suite.source, suite.target),
        "lost": lost,
        "lost_ci95": lost_ci95,
    }


def _group_row(
    label: str,
    rows: Sequence[dict[str, Any]],
    base: Evaluation,
    mean: Mapping[str, Answers],
    suite: Suite,
) -> dict[str, Any]:
    """Mean and SD over seeds, and the 95 % interval that the questions leave to this mean.

    mean: task -> each question's score averaged over the seeds.
    """
    group: dict[str, Any] = {
        "label": label,
        "tuner": rows[0]["tuner"],
        "runs": [row["name"] for row in rows],
        "seeds": [row["seed"] for row in rows],
    }
    group |= {key: mean_sd([row[key] for row in rows]) for key in SUMMARIES}
    for which, tasks in (("source", suite.source), ("target", suite.target)):
        stderr = stderr_of_mean([score_of(mean[task])[1] for task in tasks])
        group[which]["ci95"] = ci95(group[which]["mean"], stderr)
    group["drop"] = {
        task: {
            **mean_sd([row["drop"][task] for row in rows]),
            "ci95": ci95(*paired_drop(base.answers[task], mean[task], task)),
        }
        for task in suite.source
    }
    kept = {task: [row["retention"][task] for row in rows] for task in suite.source}
    group["retention"] = {task: None if None in its else mean_sd(its) for task, its in kept.items()}
    group["change"] = changes(base.answers, mean, suite.source, suite.target)
    attribution = attribution_group(rows)
    group |= {"attribution": attribution} if attribution else {}
    scales = scale_group(rows)
    group |= {"scales": scales} if scales else {}
    moved = {task: [row["scores"][task].get("kl") for row in rows] for task in base.scores}
    group["kl"] = {task: mean_sd(values) for task, values in moved.items() if None not in values}
    group |= {key: over_seeds([row[key] for row in rows]) for key in ("flips", "format", "lost")}
    return group


def _warnings(
    base: Evaluation,
    runs: Mapping[str, Evaluation],
    trained: Mapping[str, dict[str, Any]],
    restored: Mapping[str, Evaluation],
) -> list[str]:
    warnings = [
        f"{name} started from no saved model as a whole, so the base cannot be checked"
        for name in runs
        if trained[name].get("base") is None
    ]
    if base.limit is not None:
        warnings.append(f"only the first {base.limit} questions of each task were asked")
    if base.unlike:
        counts = "; ".join(f"{task} {counts}" for task, counts in base.unlike.items())
        warnings.append(f"not the official data, so no score is comparable with published ones: {counts}")
    others: dict[str, list[str]] = {}
    for name, evaluation in {"base": base, **runs, **restored}.items():
        for task, row in evaluation.scores.items():
            if row["missing"]:
                share = f"{row['missing']} of {row['n']}"
                warnings.append(f"{name}, {task}: {share} questions have no prediction and count as wrong")
        for key, value in evaluation.made_with.items():
            if value != base.made_with[key]:
                differs = f"other {key} than the base: {_difference(value, base.made_with[key])}"
                others.setdefault(differs, []).append(name)
    for differs, names in others.items():  # one line, however many were evaluated so
        which = f"{names[0]} was" if len(names) == 1 else f"{some(names, 3)} were"
        warnings.append(f"{which} evaluated with {differs}")
    return warnings


def _difference(its: Any, base: Any) -> str:
    if isinstance(its, dict) and isinstance(base, dict):
        keys = [key for key in {**its, **base} if its.get(key) != base.get(key)]
        return ", ".join(f"{key} {its.get(key)} instead of {base.get(key)}" for key in keys)
    return f"{its} instead of {base}"

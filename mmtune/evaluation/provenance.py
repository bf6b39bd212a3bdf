"""How the numbers of a report were made, in one place: for report.json, for its page and to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.core.files import read_json

TRAINED = {"Config": "config", "Training data": "data", "Trained by commit": "commit"}
EVALUATED = {
    "Precision": "precision",
    "Batch size": "batch_size",
    "Answers the batch changed": "batch_changed",
    "Padding": "padding",
    "Attention": "attention",
    "Versions": "versions",
    "Model": "model_hash",
    "Evaluated by commit": "commit",
    "Device": "device",
    "Evaluated on": "date",
}


def made_by(folder: Path) -> dict[str, Any]:
    """What an evaluation's results.json says of itself, and a command that makes it again."""
    results = read_json(folder / "results.json")
    return {
        **{key: results.get(key) for key in ("model", "model_hash", "date")},
        **{key: results.get(key) for key in ("precision", "batch_size", "padding", "attention")},
        "batch_changed": _batch_changed(results),
        "versions": results.get("environment", results.get("versions")),
        "commit": results.get("git_hash"),
        "device": (results.get("config") or {}).get("device"),
        "command": _command(results, folder),
    }


def _batch_changed(results: Mapping[str, Any]) -> str | None:
    if results.get("precision") == "float32":
        return "none, as always in float32"
    again = (results.get("changed_alone") or {}).values()
    if not again:
        return "none, asked one at a time" if results.get("batch_size") == 1 else None
    changed, asked = (sum(its[key] for its in again) for key in ("changed", "asked"))
    return f"{changed} of {asked} that were asked again one at a time"


def prompts(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task -> the prompt, and how long an answer may be."""
    results = read_json(folder / "results.json")
    limit = (results.get("decoding") or {}).get("max_new_tokens")
    made = {}
    for task in tasks:
        config = results["configs"][task]
        tokens = limit if isinstance(limit, int) else config.get("max_new_tokens")
        made[task] = {"prompt": config.get("prompt"), "max_new_tokens": tokens}
    return made


def _command(results: Mapping[str, Any], folder: Path) -> str:
    given = results.get("given") or {}
    tasks = ",".join(given.get("tasks") or results["results"])
    words = ["mmtune", "eval", "--model", str(results["model"]), "--tasks", tasks]
    if len(set(results["splits"].values())) == 1:
        words += ["--split", next(iter(results["splits"].values()))]
    tokens = (results.get("decoding") or {}).get("max_new_tokens")
    options = {
        "--batch_size": results.get("batch_size"),
        "--dtype": results.get("precision"),
        "--limit": results.get("limit"),
        "--gen_kwargs": f"max_new_tokens={tokens}" if isinstance(tokens, int) else None,
        "--decode": given.get("decode"),
        "--data_root": given.get("data_root"),
        "--output_path": folder,
    }
    configs = results.get("configs", {})
    if {config.get("decode") for config in configs.values()} == {"likelihood"}:
        options["--decode"] = "likelihood"
    words += [
        f"--question_file={task}={file}"
        for task, config in configs.items()
        for file in (config.get("question_files") or {}).values()
        if Path(file).is_absolute()  # given on the command line; a protocol's own lies under its root
    ]
    words += [word for key, value in options.items() if value is not None for word in (key, str(value))]
    return shlex.join(words)


def made_box(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's box holds.

    common: (label, value) of all that is the same for every model; tasks: a row each; columns and models:
    what differs between the models; commands: one for each model, and the report's; text: all of it, to copy.
    """
    made, base, runs = report["made_with"], report["base"], report["runs"]
    evaluations = {f"{base['name']} (base)": base["made_by"], **{run["name"]: run["made_by"] for run in runs}}
    by_model = {
        label: {name: said(its) for name, its in made[key].items()} for label, key in TRAINED.items()
    } | {
        label: {name: said(row[key]) for name, row in evaluations.items()} for label, key in EVALUATED.items()
    }
    differ = {label: its for label, its in by_model.items() if len(set(its.values())) > 1}
    common = [
        ("Suite", f"{made['suite']}: source {', '.join(made['source'])}; target {', '.join(made['target'])}"),
        ("Questions", f"the first {made['limit']} of each set" if made["limit"] else "all of each set"),
        ("Decoding", said(made["decoding"])),
        *((label, next(iter(its.values()))) for label, its in by_model.items() if label not in differ),
    ]
    tasks = [
        {
            "task": task,
            "part": "target" if task in made["target"] else "source",
            "split": made["splits"][task],
            "rule": base["scores"][task]["rule"],
            "questions": base["scores"][task]["n"],
            "protocol": made["protocols"][task],
            "annotations": made["annotations"][task],
            "tokens": said(made["tasks"][task]["max_new_tokens"]),
            "prompt": said(made["tasks"][task]["prompt"]),
        }
        for task in (*made["source"], *made["target"])
    ]
    models = [
        {"model": name} | {label: its.get(name, "") for label, its in differ.items()} for name in evaluations
    ]
    commands = [*(its["command"] for its in evaluations.values()), made["command"]]
    lines = [f"{label}: {value}" for label, value in common]
    for row in (*tasks, *models):
        lines += ["", *(f"{key}: {json.dumps(its) if key == 'prompt' else its}" for key, its in row.items())]
    return {
        "common": common,
        "tasks": tasks,
        "columns": list(differ),
        "models": models,
        "commands": commands,
        "text": "\n".join([*lines, "", *commands]) + "\n",
    }


def said(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(its)}" for key, its in value.items()) or "not said"
    if value is None or isinstance(value, bool):
        return "not said" if value is None else ("yes" if value else "no")
    return str(value)

"""A run's folder: new, stopped or finished, and still the run that is asked for?

No torch here, so that a finished run says so at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmtune.core.config import Source, to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_text
from mmtune.parts.fingerprint import start_hash
from mmtune.run import RunOptions, data_hash, deciding

AFRESH = "give the run another name, or remove its folder (scripts/quickstart.sh: --fresh)."


def open_run(options: RunOptions, resume: bool) -> bool:
    """Makes the folder of a run ready to train in. Returns whether the run is finished already.

    Raises UserError where the folder holds a run and `resume` is not given, and where it holds another run
    than this one: one of another config, of other training data, or from another model.
    """
    folder, described = options.folder, to_dict(options)
    saved = folder / "run.yaml"
    done = done_folders(options)
    # A run that was stopped before its first step, by a mistake in its config for example, is none.
    if not any(path.exists() for path in (folder / "metrics.jsonl", folder / "checkpoints", *done)):
        write_text(saved, yaml.safe_dump(described, sort_keys=False))
        return False
    if changed := changed_keys(options):
        raise UserError(
            f"the config differs from the one this run was started with, in: {', '.join(changed)}",
            where=saved,
            mend=f"Take the same config, or {AFRESH}",
        )
    if not resume:
        raise UserError(
            "this folder already holds a run", where=folder, mend=f"Go on with --resume, or {AFRESH}"
        )
    for stage, path in zip(options.all_stages(), done, strict=True):
        if (path / "trained.json").is_file():
            check_origin(options, data_hash(stage.all_data), read_json(path / "trained.json"), path)
    if Source(saved).tree != described:
        write_text(saved, yaml.safe_dump(described, sort_keys=False))
    return is_finished(options)


def changed_keys(options: RunOptions, apart: tuple[str, ...] = ()) -> list[str]:
    """What decides a run's result and is not as its folder's run.yaml has it, each with both values.

    apart: keys that are not looked at. Raises UserError where that file cannot be read.
    """
    old, new = deciding(Source(options.folder / "run.yaml").tree), deciding(to_dict(options))
    return [
        f"{key} ({old.get(key, 'not given')} before, {new.get(key, 'not given')} now)"
        for key in sorted(old.keys() | new.keys())
        if key not in apart and (key not in old or key not in new or old[key] != new[key])
    ]


def is_finished(options: RunOptions) -> bool:
    """Whether the last stage is trained."""
    return (done_folders(options)[-1] / "trained.json").is_file()


def done_folders(options: RunOptions) -> list[Path]:
    """Where each stage's model lies once it is trained: stage-1, stage-2, ... and final."""
    count = len(options.all_stages())
    return [options.folder / f"stage-{i}" for i in range(1, count)] + [options.folder / "final"]


def check_origin(options: RunOptions, data: str, record: Any, where: Path) -> None:
    """Raises UserError unless a stage or checkpoint comes from the same training data and model as now.

    data: the hash of the stage's training files. record: what was written when it was trained.
    """
    if record.get("data") != data:
        raise UserError(
            "the training data is not what this run was started with",
            where=where,
            mend=f"Put the files back, or {AFRESH}",
        )
    base = start_hash(options.model)
    if record.get("base") != base:
        raise UserError(
            f"the model this run started from was {record.get('base')}; {options.model.base} is now {base}",
            where=where,
            mend=f"Put the model back, or {AFRESH}",
        )

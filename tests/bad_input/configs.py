"""Runs whose YAML or overrides are at fault."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from tests.bad_input.bench import Bench, Kind
from tests.world import FULL, LORA, PENALTY, SCULPT


def _text(bench: Bench, **changes: object) -> str:
    """The text of a good YAML."""
    command = bench.train(**changes)
    return Path(str(command[1])).read_text()


def _language(bench: Bench, **options: object) -> list[object]:
    return bench.train(tune={"language": {**SCULPT, "prune_at": 1, **options}}, train={"steps": 3})


def _suite(bench: Bench, text: str) -> list[object]:
    return [
        "eval",
        "--model",
        bench.world / "base",
        "--suite",
        bench.file("mine.yaml", text),
        "--output_path",
        "o",
    ]


def _closed(bench: Bench) -> list[object]:
    command = bench.train()
    os.chmod(str(command[1]), 0)
    return command


def _written(bench: Bench) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((bench.here / "run" / "run.yaml").read_text())
    return made


ACCENTS = "m\u00eame l\u00e0"
MULTIPLYING = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

KINDS = [
    # ---- The file
    Kind("no such YAML", lambda b: ["train", b.here / "no.yaml"], "no such file", "no.yaml", "path right"),
    Kind(
        "a folder for a YAML",
        lambda b: ["train", b.here],
        "this is a folder",
        "mmtune: /",
        "Name a file in it",
    ),
    Kind("an empty YAML", lambda b: b.yaml(""), "the file is empty", "run.yaml", "written whole?"),
    Kind("a YAML nobody may read", _closed, "Permission denied", "run.yaml", "Look at its permissions"),
    Kind(
        "YAML indented by tabs", lambda b: b.yaml("name: a\ntrain:\n\tclip: 1\n"), "'\\t'", "line 3", "spaces"
    ),
    Kind(
        "a bracket never closed", lambda b: b.yaml("name: [a\nseed: 1\n"), "not valid YAML", "line 2", "Mend"
    ),
    Kind(
        "a NUL byte in YAML", lambda b: b.yaml(b"name: a\0b\n"), "not valid YAML", "run.yaml", "a text file?"
    ),
    Kind(
        "Latin-1 YAML",
        lambda b: b.yaml("seed: 1\nname: caf\u00e9".encode("latin1")),
        "not a UTF-8",
        "line 2",
        "iconv",
    ),
    Kind(
        "YAML nested too deep",
        lambda b: b.yaml("[" * 5000),
        "nested too deeply",
        "run.yaml",
        "the file you mean",
    ),
    Kind(
        "a plain word for a YAML", lambda b: b.yaml("hello"), "found 'hello'", "line 1", "expected a mapping"
    ),
    Kind(
        "a key given twice",
        lambda b: b.yaml(_text(b) + "seed: 1\nseed: 2\n"),
        "given twice",
        "seed",
        "Keep one",
    ),
    Kind(
        "an alias inside itself",
        lambda b: b.yaml("name: &a [*a]\n"),
        "inside itself",
        "line 1, name.0",
        "Write",
    ),
    Kind("aliases that multiply", lambda b: b.yaml(MULTIPLYING), "more than 100000", "run.yaml", "multiply"),
    Kind(
        "a merge key", lambda b: b.yaml("name: a\n<<: {seed: 1}\n"), "merge keys", "line 2", "Write the keys"
    ),
    Kind("a list for a key", lambda b: b.yaml("name: a\n? [b]\n: 1\n"), "a key must be", "line 2", "Write"),
    Kind(
        "a BOM and Windows line ends",
        lambda b: b.yaml("\ufeff" + _text(b).replace("\n", "\r\n")),
        then=lambda b: _written(b)["name"] == "run",
    ),
    Kind(
        "an anchor and an alias",
        lambda b: b.yaml(
            _text(b, tune={"vision": {"tuner": "frozen"}}).replace(
                "tune:\n", "tune:\n  connector: &it {tuner: full, lr: 1e-4}\n  language: *it\n"
            )
        ),
        then=lambda b: _written(b)["tune"]["language"] == {"lr": 1e-4, "tuner": "full"},
    ),
    # ---- Names
    Kind(
        "an unknown key",
        lambda b: b.train(train={"clipp": 1}),
        "'clipp'",
        "train.clipp",
        "Did you mean 'clip'?",
    ),
    Kind("a key that is missing", lambda b: b.train(model=None), "'model' is missing", "run.yaml", "missing"),
    Kind(
        "an unknown tuner",
        lambda b: b.train("tune.language.tuner=loar"),
        "'loar'",
        "tune.language.tuner",
        "'lora'",
    ),
    Kind(
        "an unknown tower",
        lambda b: b.train("model.vision={tower: vit, weights: x}"),
        "'vit'",
        "model.vision",
        "clip",
    ),
    Kind(
        "an unknown connector",
        lambda b: b.train("model.connector={kind: mlp}"),
        "'mlp'",
        "model.connector",
        "linear",
    ),
    Kind(
        "an unknown chat format",
        lambda b: b.train("model.language={weights: x, chat: vicuna}"),
        "'vicuna'",
        "chat",
        "'vicuna_v1'",
    ),
    Kind(
        "an unknown card",
        lambda b: b.train(data=[{"card": "tiny_icon"}]),
        "'tiny_icon'",
        "data.0.card",
        "tiny_iconqa",
    ),
    Kind(
        "an unknown split of a card",
        lambda b: b.train(data=[{"card": "tiny_iconqa", "split": "trian"}]),
        "'trian'",
        "data.0.split",
        "'train'",
    ),
    Kind(
        "an unknown schedule",
        lambda b: b.train("train.schedule=cosin"),
        "'cosin'",
        "train.schedule",
        "'cosine'",
    ),
    Kind(
        "an unknown type of number",
        lambda b: b.train("model.dtype=float16"),
        "'float16'",
        "model.dtype",
        "bfloat16",
    ),
    Kind(
        "an unknown target module",
        lambda b: b.train("tune.language.targets=[q_proj]"),
        "'q_proj'",
        "tune.language.targets",
        "model.layers.0.self_attn.q_proj",
    ),
    Kind(
        "an unknown module to penalise",
        lambda b: b.train("tune.language.penalty={weight: 1, modules: [x]}"),
        "'x'",
        "penalty.modules",
        "Known: model",
    ),
    Kind(
        "an unknown suite",
        lambda b: b.train(evaluate={"suite": "tinny"}),
        "'tinny'",
        "unknown suite",
        "'tiny'",
    ),
    Kind(
        "a suite of an unknown task",
        lambda b: _suite(b, "name: m\nsource: [tiny_txt]\ntarget: [tiny_iconqa]"),
        "'tiny_txt'",
        "line 2, source.0",
        "'tiny_text'",
    ),
    Kind(
        "a suite that lists a task twice",
        lambda b: _suite(b, "name: m\nsource: [tiny_text]\ntarget: [tiny_text]"),
        "given twice",
        "target.0",
        "Keep one",
    ),
    # ---- Overrides
    Kind(
        "an override of an unknown key", lambda b: b.train("train.cilp=1"), "'cilp'", "command line", "'clip'"
    ),
    Kind(
        "an override without =",
        lambda b: b.train("train.clip"),
        "'train.clip' is no override",
        "command line",
        "key=value",
    ),
    Kind(
        "an override of the third of one",
        lambda b: b.train("data.2.limit=1"),
        "'2'",
        "data.2.limit",
        "list of 1",
    ),
    Kind(
        "an override inside a number",
        lambda b: b.train("train.steps.x=1"),
        "holds a plain value",
        "train.steps.x",
        "no 'x'",
    ),
    # ---- Values
    Kind(
        "a text for a number",
        lambda b: b.train("train.clip=big"),
        "'big'",
        "train.clip",
        "expected a finite number",
    ),
    Kind(
        "a number in quotes",
        lambda b: b.train(train={"clip": "1.0"}),
        "'1.0'",
        "train.clip",
        "without quotes",
    ),
    Kind(
        "1e-4, which YAML takes for text",
        lambda b: b.train("tune.connector.lr=1e-4"),
        then=lambda b: _written(b)["tune"]["connector"]["lr"] == 1e-4,
    ),
    Kind(
        "010, which YAML takes for 8",
        lambda b: b.train("seed=010"),
        "010 would be read as 8",
        "seed",
        "Write 8",
    ),
    Kind(
        "1:30, which YAML takes for 90",
        lambda b: b.train("train.steps=1:30"),
        "read as 90",
        "train.steps",
        "Write 90",
    ),
    Kind(
        "no, which YAML takes for false",
        lambda b: b.yaml("name: no\n"),
        "found False",
        "line 1, name",
        "Put it in quotes",
    ),
    Kind(
        "a date for a name",
        lambda b: b.yaml("name: 2026-11-21\n"),
        "expected text",
        "line 1, name",
        "Put it in quotes",
    ),
    Kind(
        "a learning rate of NaN",
        lambda b: b.train("tune.connector.lr=.nan"),
        "found nan",
        "tune.connector.lr",
        "a finite number",
    ),
    Kind(
        "an infinite learning rate",
        lambda b: b.train("tune.connector.lr=.inf"),
        "found inf",
        "tune.connector.lr",
        "a finite number",
    ),
    Kind(
        "a negative learning rate",
        lambda b: b.train("tune.language.lr=-1e-3"),
        "-0.001",
        "tune.language.lr",
        "0 or more",
    ),
    Kind(
        "a negative penalty",
        lambda b: b.train("tune.language.penalty={weight: -1}"),
        "found -1",
        "penalty.weight",
        "0 or more",
    ),
    Kind("no steps", lambda b: b.train("train.steps=0"), "found 0", "train.steps", "expected 1 or more"),
    Kind(
        "steps and epochs", lambda b: b.train("train.epochs=1"), "'epochs' or 'steps'", "train", "give either"
    ),
    Kind("a warm-up of 2", lambda b: b.train("train.warmup=2"), "found 2", "train.warmup", "0 to below 1"),
    Kind(
        "batch sizes that don't multiply",
        lambda b: b.train("train.micro_batch_size=3", train={"batch_size": 8}),
        "8 is no multiple of 3",
        "micro_batch_size",
        "must give batch_size",
    ),
    Kind("density 0", lambda b: _language(b, density=0), "found 0", "density", "more than 0 and less than 1"),
    Kind("density 2", lambda b: _language(b, density=2), "found 2", "density", "more than 0 and less than 1"),
    Kind(
        "density NaN", lambda b: _language(b, density=float("nan")), "found nan", "density", "a finite number"
    ),
    Kind(
        "a density that keeps nothing",
        lambda b: _language(b, density=1e-4),
        "keeps no entry",
        "density",
        "Raise it",
    ),
    Kind(
        "pruning after the end",
        lambda b: _language(b, prune_at=3),
        "ends after 3",
        "prune_at",
        "Prune earlier",
    ),
    Kind(
        "pruning at step 1.5",
        lambda b: _language(b, prune_at=1.5),
        "found 1.5",
        "prune_at",
        "a fraction below 1",
    ),
    Kind("rank 0", lambda b: b.train("tune.language.rank=0"), "found 0", "tune.language.rank", "1 or more"),
    Kind(
        "a rank above the matrix",
        lambda b: b.train("tune.language.rank=33"),
        "rank 33",
        "tune.language.rank",
        "Lower it to 16",
    ),
    Kind(
        "pruning the connector",
        lambda b: b.train(tune={"connector": SCULPT}),
        "language model only",
        "tune.connector",
        "Use full or lora",
    ),
    Kind(
        "a penalty on what is pruned by nobody",
        lambda b: b.train(tune={"language": {**LORA, "penalty": {**PENALTY, "modules": "pruned"}}}),
        "nothing is pruned",
        "penalty.modules",
        "modules: all",
    ),
    Kind(
        "nothing that trains",
        lambda b: b.train(tune={"connector": {"tuner": "frozen"}}),
        "no part of the model trains",
        "tune",
        "another tuner",
    ),
    Kind(
        "a path and a card",
        lambda b: b.train(data=[{"path": "x", "card": "tiny_iconqa"}]),
        "'card' or 'path'",
        "data.0",
        "give either",
    ),
    Kind(
        "an empty list of data",
        lambda b: b.train(data=[]),
        "'data' is missing",
        "run.yaml",
        "Or give 'stages'",
    ),
    Kind("stages beside data", lambda b: b.train("stages=[]"), "exclude each other", "data", "'stages'"),
    Kind("a name with a slash", lambda b: b.train("name=a/b"), "'a/b'", "name", "the name of a folder"),
    Kind("a name with a NUL byte", lambda b: b.train('name="a\\0b"'), "NUL byte", "name", "Take it out"),
    Kind(
        "a name too long for a folder",
        lambda b: b.train(f"name={'x' * 300}"),
        "xxx' cannot be",
        "name",
        "up to 200 letters",
    ),
    Kind(
        "several faults at once",
        lambda b: b.train(
            "seed=x", "train.steps=0", "tune.language.lr=-1", tune={"connector": FULL, "language": LORA}
        ),
        "3 faults",
        "train.steps",
        "expected a whole number",
    ),
    Kind(
        "spaces and accents in paths",
        lambda b: b.train(f"output={b.here / ACCENTS}", "name=un essai"),
        then=lambda b: (b.here / ACCENTS / "un essai" / "final" / "trained.json").is_file(),
    ),
    Kind(
        "the folder of the runs is a file",
        lambda b: b.train(f"output={b.file('full', 'x')}"),
        "Not a directory",
        "full/run/run.yaml",
        "cannot be written",
    ),
    # ---- The command itself
    Kind("an unknown command", lambda b: ["trian"], "invalid choice: 'trian'", "COMMAND", "'train'"),
    Kind(
        "an unknown flag",
        lambda b: [*b.train(), "--resum_", "x"],
        "unrecognized",
        "--resum_",
        "usage: mmtune",
    ),
    Kind(
        "a sweep with an empty grid",
        lambda b: [
            "sweep",
            b.file("s.yaml", f"name: s\nrun: r\nbase: b\nsuite: tiny\ngrid: {json.dumps({})}"),
        ],
        "give either 'grid' or 'runs'",
        "s.yaml",
        "list of values",
    ),
]

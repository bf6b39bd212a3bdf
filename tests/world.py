"""A small tiny world and a random model for it, for tests that run the whole of mmtune.

A folder made by `build` looks like a place where somebody works: `datasets/tiny` and the model `base`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from mmtune.data.tiny import Sizes, generate
from mmtune.data.tiny_tokenizer import train_tokenizer
from mmtune.evaluation.metrics.base import Question
from mmtune.parts.model import assemble
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.run import RunOptions, read_run
from mmtune.tuning.base import Tuner
from mmtune.tuning.shards import Shards

SIZES = Sizes(
    train=40, text=12, val=5, test=12, downstream_train=40, downstream_val=5, downstream_test=12, simple=8
)
FROZEN: dict[str, Any] = {"tuner": "frozen"}
FULL: dict[str, Any] = {"tuner": "full", "lr": 2e-4}
LORA: dict[str, Any] = {"tuner": "lora", "rank": 4, "alpha": 8, "lr": 1e-3}
SCULPT: dict[str, Any] = {**LORA, "tuner": "lorasculpt", "density": 0.1, "prune_at": 2}
PENALTY: dict[str, Any] = {"kind": "conflict", "weight": 1.0}


def build(folder: Path) -> None:
    """The world, its tokenizer, and a model with random weights that are large enough to matter."""
    torch.set_num_threads(1)  # sums always in the same order, and no waiting for a core that is busy
    world = folder / "datasets" / "tiny"
    generate(world, 0, SIZES)
    train_tokenizer(world, world / "tokenizer")
    torch.manual_seed(2)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "initializer_range": 0.3,
        "initializer_factor": 1.0,
    }
    language = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    }
    model = assemble(
        ModelOptions(
            vision=VisionOptions("clip", config=vision, layer=-2),
            connector=ConnectorOptions("mlp2x_gelu"),
            language=LanguageOptions(config=language, tokenizer=str(world / "tokenizer")),
        )
    )
    model.save_pretrained(folder / "base")


def run_file(world: Path, output: Path, name: str = "run", **changes: Any) -> Path:
    """The YAML of a short run under `output`; `changes` replace its blocks, those of `train` singly."""
    tiny = world / "datasets" / "tiny"
    train = {
        "steps": 3,
        "batch_size": 8,
        "schedule": "constant",
        "warmup": 0.0,
        "max_length": 512,
        "log_every": 1,
        **changes.pop("train", {}),
    }
    described = {
        "name": name,
        "model": {"base": str(world / "base")},
        "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
        "tune": {"vision": FROZEN, "connector": FULL, "language": LORA},
        "train": train,
        "output": str(output),
        **changes,
    }
    if "stages" in described:
        for key in ("data", "tune", "train"):
            described.pop(key)
    path = output / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in described.items() if value is not None}))
    return path


def run_options(world: Path, output: Path, name: str = "run", **changes: Any) -> RunOptions:
    """The same, read."""
    return read_run(run_file(world, output, name, **changes))


def half_right(
    model: object, protocol: object, questions: Sequence[Question], *_: object
) -> list[list[dict[str, str]]]:
    """Stands in for `answer_in_batches`: every second answer is the official one."""
    texts = [question.answers[0] if i % 2 else "nothing" for i, question in enumerate(questions)]
    return [[{"question_id": q.id, "text": text}] for q, text in zip(questions, texts, strict=True)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a model folder holds itself, by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def greatest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors; they must have the same names."""
    assert one.keys() == other.keys()
    assert one
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def penalty_of(tuner: Tuner) -> tuple[torch.Tensor, dict[torch.nn.Parameter, torch.Tensor]]:
    """A tuner's weighted penalty on one process, and what would join each parameter's gradient."""
    if tuner.weight_penalty is not None and not hasattr(tuner, "shards"):
        tuner.bind(Shards())
    value = tuner.before_backward()
    assert value is not None and tuner.weight_penalty is not None
    joining = dict(tuner.weight_penalty.ready)
    tuner.weight_penalty.ready.clear()
    return value, joining

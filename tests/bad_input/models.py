"""Models at fault: folders, configs, weights, tokenizers, parts that don't fit; and their evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.bad_input.bench import Bench, Kind

WHOLE = "it must be whole"


def _folder(bench: Bench, text: str | None) -> list[object]:
    (bench.here / "model").mkdir()
    if text is not None:
        bench.file("model/config.json", text)
    return bench.eval("model")


def _behind_a_closed_door(bench: Bench) -> list[object]:
    bench.file("in/model/config.json")
    os.chmod(bench.here / "in", 0)
    return bench.eval("in/model")


def _weights_closed(bench: Bench) -> list[object]:
    os.chmod(bench.model() / "language" / "model.safetensors", 0)
    return bench.eval("model")


def _changed(bench: Bench, file: str, **changes: Any) -> list[object]:
    """The evaluation of a copy of the model of which one JSON file says `changes`."""
    path = bench.model() / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return bench.eval("model")


def _without(bench: Bench, file: str, name: str) -> list[object]:
    """The evaluation of a copy of the model of which one tensor is missing."""
    path = bench.model() / file
    tensors = load_file(path)
    assert tensors.pop(name) is not None
    save_file(tensors, path, metadata={"format": "pt"})
    return bench.eval("model")


def _adapter(bench: Bench) -> Path:
    """A copy of the model with an adapter; the adapter's file of tensors."""
    folder = bench.model()
    core = bench.language.core("language")
    made = get_peft_model(core, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(str(folder / "adapter" / "language"))
    config = json.loads((folder / "config.json").read_text())
    config["language"]["adapter"] = "adapter/language"
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "adapter" / "language" / "adapter_model.safetensors"


def _adapter_cut(bench: Bench) -> list[object]:
    path = _adapter(bench)
    os.truncate(path, path.stat().st_size // 2)
    return bench.eval("model")


def _adapter_gone(bench: Bench) -> list[object]:
    _adapter(bench).unlink()
    return bench.eval("model")


def _adapter_lacks(bench: Bench) -> list[object]:
    path = _adapter(bench)
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})
    return bench.eval("model")


def _adapter_of_another_rank(bench: Bench) -> list[object]:
    config = _adapter(bench).with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3}))
    return bench.eval("model")


def _parts(bench: Bench, **changes: dict[str, Any]) -> list[object]:
    """A run on the world's model, some of whose parts are replaced."""
    return bench.train(model={"base": str(bench.world / "base"), **changes})


def _language(bench: Bench, file: str, content: str | None) -> list[object]:
    """A run on a language model of its own, one of whose files holds something else, or is gone."""
    weights = Path(tiny_models.save_language(bench.here / "lm"))
    if content is None:
        (weights / file).unlink()
    else:
        (weights / file).write_text(content)
    return _parts(bench, language={"weights": str(weights)})


def _tokenizer_too_large(bench: Bench) -> list[object]:
    weights = tiny_models.save_language(bench.here / "lm", vocab_size=100)
    return _parts(bench, language={"weights": weights})


def _asked(bench: Bench, *questions: dict[str, Any], task: str = "tiny_text") -> list[object]:
    """An evaluation on questions of our own."""
    lines = "\n".join(map(json.dumps, questions))
    bench.file("text/questions_test.jsonl", lines)
    return bench.eval("base", "--tasks", task, "--data_root", bench.here)


VISION = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
CLIP = {"tower": "clip", "config": VISION}
QUESTION = {"question_id": 1, "text": "What is 1 + 1?", "answer": "2"}
NEW = {"kind": "mlp2x_gelu"}

KINDS = [
    # ---- The folder
    Kind(
        "no model folder",
        lambda b: ["eval", "--model", "no/model", "--suite", "tiny", "--output_path", "o"],
        "no such folder",
        "no/model",
        "that mmtune saved",
    ),
    Kind(
        "no base to train from",
        lambda b: b.train("model.base=no/model"),
        "there is no folder no/model",
        "model.base",
        "that mmtune saved",
    ),
    Kind(
        "a folder without a config",
        lambda b: _folder(b, None),
        "no such file",
        "model/config.json",
        "path right",
    ),
    Kind(
        "a base without a config",
        lambda b: b.train(f"model.base={b.here}"),
        "holds no config.json",
        "model.base",
        "that mmtune saved",
    ),
    Kind(
        "a model of another library",
        lambda b: _folder(b, '{"model_type": "llava"}'),
        "not the config of an mmtune",
        "model/config.json",
        "model.language.weights",
    ),
    Kind(
        "a broken config",
        lambda b: _folder(b, '{"mmtune": 1,\n'),
        "not valid JSON",
        "model/config.json, line 2",
        "written whole?",
    ),
    Kind(
        "a part without a description",
        lambda b: b.describe(connector=None),
        "not the config",
        "model/config.json",
        "that mmtune saved",
    ),
    Kind(
        "a part with a field it does not have",
        lambda b: b.describe(vision={"tower": "clip", "depth": 3, "weights": "vision"}),
        "'depth'",
        "model/config.json",
        "Known: config",
    ),
    Kind(
        "a model made from weights that are gone",
        lambda b: b.describe(language={"weights": "../lm", "chat": "template"}),
        "no longer at",
        "model/config.json",
        "Put them back",
    ),
    Kind(
        "a model of an unknown tower",
        lambda b: b.describe(vision={"tower": "vit", "weights": "vision"}),
        "unknown vision tower 'vit'",
        "model/config.json",
        "clip",
    ),
    Kind(
        "a model in a folder nobody may enter",
        _behind_a_closed_door,
        "Permission denied",
        "in/model",
        "permissions",
    ),
    Kind(
        "a model whose weights nobody may read",
        _weights_closed,
        "Permission denied",
        "model/language/model.safetensors",
        "Look at its permissions",
    ),
    Kind(
        "a model of a name too long",
        lambda b: b.eval("x" * 300),
        "File name too long",
        "xxx",
        "how long its name is",
    ),
    # ---- Files cut short or missing
    Kind(
        "a connector cut short",
        lambda b: b.cut("connector/model.safetensors"),
        "not a whole safetensors",
        "connector/model.safetensors",
        WHOLE,
    ),
    Kind(
        "a connector that is missing",
        lambda b: b.cut("connector/model.safetensors", 0),
        "no such file",
        "connector/model.safetensors",
        WHOLE,
    ),
    Kind(
        "a connector that lacks a tensor",
        lambda b: _without(b, "connector/model.safetensors", "linear_2.bias"),
        "linear_2.bias",
        "connector/model.safetensors",
        WHOLE,
    ),
    Kind(
        "a tower cut short", lambda b: b.cut("vision/model.safetensors"), "cannot be loaded", "vision", WHOLE
    ),
    Kind(
        "a language model cut short",
        lambda b: b.cut("language/model.safetensors"),
        "cannot be loaded",
        "language",
        WHOLE,
    ),
    Kind(
        "a language model without weights",
        lambda b: b.cut("language/model.safetensors", 0),
        "cannot be loaded",
        "language",
        WHOLE,
    ),
    Kind(
        "a language model that lacks a tensor",
        lambda b: _without(b, "language/model.safetensors", "model.norm.weight"),
        "model.norm.weight",
        "language",
        "copy the folder",
    ),
    Kind(
        "a language model of another inner width",
        lambda b: _changed(b, "language/config.json", intermediate_size=80),
        "of another shape",
        "language",
        "of one model",
    ),
    Kind("an adapter cut short", _adapter_cut, "the adapter cannot be loaded", "adapter/language", WHOLE),
    Kind(
        "an adapter without tensors", _adapter_gone, "no adapter_model.safetensors", "adapter/language", WHOLE
    ),
    Kind("an adapter that lacks a tensor", _adapter_lacks, "missing adapter keys", "adapter/language", WHOLE),
    Kind("an adapter of another rank", _adapter_of_another_rank, "size mismatch", "adapter/language", WHOLE),
    # ---- Parts that don't fit
    Kind(
        "a tower of another width than the connector",
        lambda b: _parts(b, vision=CLIP),
        "it takes 24 and gives 32, but the tower is 20 wide",
        "connector/config.json",
        "Start a new one",
    ),
    Kind(
        "a connector of another kind",
        lambda b: _parts(b, connector={"kind": "linear", "weights": str(b.world / "base" / "connector")}),
        "kind is 'mlp2x_gelu'",
        "connector/config.json",
        "connector: {kind: linear}",
    ),
    Kind(
        "a language model of another width than the connector",
        lambda b: _parts(b, language={"weights": tiny_models.save_language(b.here / "lm", hidden_size=48)}),
        "gives 32, but the tower is 24 wide and the language model 48",
        "connector/config.json",
        "Start a new one",
    ),
    Kind(
        "a tower with too few layers",
        lambda b: _parts(b, connector=NEW, vision={**CLIP, "layer": -9}),
        "layer -9",
        "model.vision.config",
        "Name one",
    ),
    Kind(
        "a tower with a field it does not have",
        lambda b: _parts(b, connector=NEW, vision={"tower": "clip", "config": {**VISION, "patchsize": 8}}),
        "'patchsize'",
        "model.vision.config",
        "'patch_size'",
    ),
    Kind(
        "a tower whose heads don't divide it",
        lambda b: _parts(
            b, connector=NEW, vision={"tower": "clip", "config": {**VISION, "num_attention_heads": 3}}
        ),
        "refused by transformers",
        "model.vision.config",
        "Correct",
    ),
    Kind(
        "a language model for a tower",
        lambda b: _parts(b, vision={"tower": "clip", "weights": str(b.world / "base" / "language")}),
        "a llama model, not a clip",
        "base/language",
        "hub name of such a model",
    ),
    Kind(
        "an unknown family",
        lambda b: _parts(
            b, language={"config": {"model_type": "lama"}, "tokenizer": str(b.world / "base" / "language")}
        ),
        "'lama'",
        "model.language.config",
        "llama",
    ),
    Kind(
        "weights and a config",
        lambda b: _parts(b, vision={**CLIP, "weights": "x"}),
        "'weights' or",
        "model.vision",
        "give either",
    ),
    Kind(
        "no chat template",
        lambda b: _language(b, "chat_template.jinja", None),
        "no chat template",
        "lm",
        "model.language.chat",
    ),
    Kind(
        "a broken tokenizer",
        lambda b: _language(b, "tokenizer.json", "{"),
        "no tokenizer can be loaded",
        "lm",
        "that has one",
    ),
    Kind(
        "a config of a language model cut short",
        lambda b: _language(b, "config.json", "{"),
        "not valid JSON",
        "lm/config.json, line 1",
        "written whole",
    ),
    Kind(
        "a tokenizer larger than its model",
        _tokenizer_too_large,
        "100 embeddings",
        "lm",
        "don't belong together",
    ),
    # ---- Evaluation
    Kind(
        "an unknown task",
        lambda b: b.eval("base", "--tasks", "tiny_txt"),
        "unknown task 'tiny_txt'",
        "task",
        "'tiny_text'",
    ),
    Kind(
        "a task asked twice",
        lambda b: b.eval("base", "--tasks", "tiny_text,tiny_text"),
        "given twice: tiny_text",
        "tasks",
        "Name each task once",
    ),
    Kind(
        "an unknown split of a task",
        lambda b: b.eval("base", *("--split", "trian")),
        "no split 'trian'",
        "task 'tiny_text'",
        "Known: test, val",
    ),
    Kind(
        "no annotations",
        lambda b: b.eval("base", "--data_root", b.here),
        "no such annotation file",
        "text/questions_test.jsonl",
        "mmtune data prepare",
    ),
    Kind(
        "a batch of a word",
        lambda b: b.eval("base", "--batch_size", "big"),
        "'big'",
        "--batch_size",
        "whole number",
    ),
    Kind(
        "gen_kwargs that are not greedy",
        lambda b: b.eval("base", "--gen_kwargs", "top_p=1"),
        "'top_p=1'",
        "--gen_kwargs",
        "max_new_tokens=N",
    ),
    Kind(
        "a question without a text",
        lambda b: _asked(b, {"question_id": 1, "answer": "2"}),
        "'text' is missing",
        "questions_test.jsonl, line 1",
        "Found: question_id",
    ),
    Kind(
        "a question given twice",
        lambda b: _asked(b, QUESTION, QUESTION),
        "more than once: 1",
        "questions_test.jsonl",
        "must name one question",
    ),
    Kind(
        "<image> in a question",
        lambda b: _asked(b, {**QUESTION, "text": "What does <image> mean?"}),
        "holds <image>",
        "question 1",
        "Spell it",
    ),
    Kind(
        "a question longer than the context",
        lambda b: _asked(b, {**QUESTION, "text": "word " * 9999}),
        "context has 512",
        "question 1",
        "longer context",
    ),
    Kind(
        "a picture of a question that is missing",
        lambda b: _asked(b, {**QUESTION, "image": "no.png"}),
        "pictures that are not there (1 of 1)",
        "no.png",
        "--data_root DIR",
    ),
    Kind(
        "a picture of a question elsewhere",
        lambda b: _asked(b, {**QUESTION, "image": "../no.png"}),
        "leads out",
        "'../no.png'",
        "holds all of them",
    ),
    Kind(
        "a file for the folder of results",
        lambda b: (b.file("out"), b.eval())[1],
        "a file",
        "out",
        "another --output_path",
    ),
    Kind(
        "special tokens in a question",
        lambda b: _asked(b, {**QUESTION, "text": "</s><|end|>"}),
        then=lambda b: (b.here / "out" / "results.json").is_file(),
    ),
]

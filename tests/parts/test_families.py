"""Families of language models, each as a tiny random one, against transformers' own class."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from mmtune.data.batches import Batch
from mmtune.data.chat import IGNORE
from mmtune.interop.merged import export_merged
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.proof import prove
from mmtune.tuning.base import PenaltyOptions, Tuner
from mmtune.tuning.frozen import FrozenOptions
from mmtune.tuning.full import FullOptions
from mmtune.tuning.kl import Teacher
from mmtune.tuning.lora import LoraOptions
from mmtune.tuning.sculpt import SculptOptions
from mmtune.tuning.shards import Shards
from tests import tiny_models as tiny

MIXED = [1, 0, 2]
NEW_TOKENS = 6
LORA: dict[str, Any] = {"lr": 1e-2, "rank": 2, "alpha": 4}
TUNERS: dict[str, Any] = {
    "frozen": FrozenOptions(),
    "full": FullOptions(lr=1e-3, penalty=PenaltyOptions(1.0)),
    "lora": LoraOptions(**LORA),
    "lorasculpt": SculptOptions(**LORA, density=0.5, prune_at=2, penalty=PenaltyOptions(1.0)),
    "lora_kl": LoraOptions(**LORA),
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny.model(tmp_path_factory.mktemp(request.param), request.param)


def own_class(model: VisionLanguageModel) -> Any:
    """transformers' own model from the same files, computing attention without any kernel."""
    assert model.options.language and model.options.language.weights
    weights = model.options.language.weights
    return AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    return model.language.logits(model.language.hidden(model.splice(batch), batch.attention_mask))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_logits_and_loss_are_its_own(model: VisionLanguageModel, left: bool) -> None:
    theirs, batch = own_class(model), tiny.batch(MIXED, left=left)
    real = batch.attention_mask.bool()
    assert batch.labels is not None
    with torch.no_grad():
        made = theirs(
            inputs_embeds=model.splice(batch), attention_mask=batch.attention_mask, labels=batch.labels
        )
        loss = model(batch)
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(logits(model, batch)[real], made.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss / (batch.labels != IGNORE).sum(), made.loss, rtol=1e-5, atol=1e-5)


def test_greedy_answers_are_its_own(model: VisionLanguageModel) -> None:
    """In a left-padded batch with a cache, against each row by itself without one."""
    theirs, batch = own_class(model), tiny.batch(MIXED, left=True)
    theirs.generation_config = GenerationConfig()
    found = model.generate(batch, NEW_TOKENS)
    with torch.no_grad():
        embeddings = model.splice(batch)
        for row, mask, answer in zip(embeddings, batch.attention_mask.bool(), found, strict=True):
            made = theirs.generate(
                inputs_embeds=row[mask].unsqueeze(0),
                attention_mask=torch.ones(1, int(mask.sum()), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=False,
                eos_token_id=model.end_ids,
                pad_token_id=0,
            )[0].tolist()
            ends = [i for i, token in enumerate(made) if token in model.end_ids]
            assert answer == made[: ends[0] if ends else None]
    assert len({tuple(answer) for answer in found}) > 1  # they depend on what was asked


def test_it_is_what_mmtune_takes_it_for(model: VisionLanguageModel) -> None:
    found = prove(model.language)
    assert [each.what for each in found if not each.sound] == []
    assert len(model.language.layers()) == model.language.hf.config.num_hidden_layers


def train(model: VisionLanguageModel, tuners: dict[str, Tuner], kl: bool) -> list[float]:
    """Three steps by hand; the connector trains along. Returns the losses."""
    for part, tuner in tuners.items():
        tuner.attach(model, part)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    shards = Shards(optimizer)
    teacher = Teacher(model)
    teacher.bind(model, shards)
    for tuner in tuners.values():
        tuner.start(3, 0)
        tuner.bind(shards)
    model.train()
    batch = tiny.batch(MIXED)
    losses = []
    for step in range(1, 4):
        for tuner in tuners.values():
            tuner.before_backward()
        loss, divergence = teacher.losses(batch) if kl else (model(batch), torch.zeros(()))
        (loss + divergence).backward()
        losses.append(loss.item())
        for tuner in tuners.values():
            tuner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        for tuner in tuners.values():
            tuner.after_step(step)
    model.eval()
    return losses


def around(language: Any) -> dict[str, Tuner]:
    """A tuner of the language model, with a frozen tower and a connector that trains."""
    parts: dict[str, Any] = {
        "vision": FrozenOptions(),
        "connector": FullOptions(lr=1e-3),
        "language": language,
    }
    return {part: options.make() for part, options in parts.items()}


@pytest.mark.parametrize("name", TUNERS)
def test_tuned_saved_and_loaded(model: VisionLanguageModel, tmp_path: Path, name: str) -> None:
    tuned = deepcopy(model)
    before = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    losses = train(tuned, around(TUNERS[name]), kl=name == "lora_kl")
    assert losses[-1] < losses[0] < float("inf")

    changed = {
        key.replace(".base_layer.", ".")
        for key, tensor in tuned.state_dict().items()
        if ".lora_" not in key and not torch.equal(tensor, before[key.replace(".base_layer.", ".")])
    }
    expected = {f"connector.{key}" for key in model.connector.state_dict()}
    if name == "full":
        expected |= {f"language.{key}" for key, _ in model.language.named_parameters(remove_duplicate=False)}
    assert changed == expected

    tuned.save_pretrained(tmp_path)
    batch, again = tiny.batch(MIXED), VisionLanguageModel.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch), logits(tuned, batch), rtol=1e-5, atol=1e-5)
    tied = model.language.hf.config.tie_word_embeddings
    hf = again.language.hf
    assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) == tied
    if name == "full":
        stored = load_file(tmp_path / "language/model.safetensors")
        matrices = [key for key, tensor in stored.items() if tensor.shape == (tiny.VOCABULARY, tiny.WIDTH)]
        assert len(matrices) == (1 if tied else 2)
    elif name != "frozen":
        alone = PeftModel.from_pretrained(own_class(model), tmp_path / "adapter/language").eval()
        with torch.no_grad():
            made = alone(inputs_embeds=tuned.splice(batch), attention_mask=batch.attention_mask).logits
        real = batch.attention_mask.bool()
        torch.testing.assert_close(logits(again, batch)[real], made[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt_neox"])
def test_merged_it_says_the_same(tmp_path: Path, family: str) -> None:
    """Tied and capped, with biases everywhere, packed and parallel."""
    model = tiny.model(tmp_path / "parts", family)
    train(model, around(LoraOptions(**LORA)), kl=False)
    model.save_pretrained(tmp_path / "tuned")
    export_merged(tmp_path / "tuned", tmp_path / "merged")
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert not merged.adapters
    batch = tiny.batch(MIXED)
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-4, atol=1e-4)

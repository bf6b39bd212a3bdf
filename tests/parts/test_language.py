"""Hidden states and head of several families against transformers' own forward pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmtune.core.errors import UserError
from mmtune.parts.language import LanguageModel, load_tokenizer
from tests.tiny_models import FAMILIES, VOCABULARY, WIDTH, save_language, save_tower, tokenizer

FP32 = torch.float32


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [3, 9, WIDTH] and a mask with a row padded to the right and one to the left.

    The second alone shows whether the mask is heeded: no word sees what comes after it anyway.
    """
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    mask[2, :4] = 0
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(3)), mask


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    weights = save_language(tmp_path, family, tie_word_embeddings=tied)
    language = LanguageModel.load(weights, None, FP32)
    theirs = AutoModelForCausalLM.from_pretrained(weights)
    embeddings, mask = inputs()
    with torch.no_grad():
        found = language.logits(language.hidden(embeddings, mask))
        expected = theirs(inputs_embeds=embeddings, attention_mask=mask).logits
    assert found.shape == (3, 9, VOCABULARY)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_scale_and_cap_matter_here(tmp_path: Path, family: str) -> None:
    """Otherwise the test above could not tell whether they are applied."""
    language = LanguageModel.load(save_language(tmp_path, family), None, FP32)
    with torch.no_grad():
        hidden = language.hidden(*inputs())
        bare = language.hf.get_output_embeddings()(hidden)
        assert (language.logits(hidden) - bare).abs().max() > 0.1


def test_the_head_on_chosen_positions(tmp_path: Path) -> None:
    language = LanguageModel.load(save_language(tmp_path), None, FP32)
    with torch.no_grad():
        hidden = language.hidden(*inputs())
        chosen = hidden[:, [2, 5]]
        torch.testing.assert_close(language.logits(chosen), language.logits(hidden)[:, [2, 5]])


def test_embeddings_are_the_models_own(tmp_path: Path) -> None:
    language = LanguageModel.load(save_language(tmp_path), None, FP32)
    ids = torch.tensor([[1, 9, 44], [7, 7, 0]])
    assert torch.equal(language.embed(ids), language.hf.get_input_embeddings().weight[ids])


def test_too_few_embeddings_for_the_tokenizer(tmp_path: Path) -> None:
    weights = save_language(tmp_path, vocab_size=260)
    with pytest.raises(UserError, match="tokenizer has 261 tokens, the model only 260 embeddings"):
        LanguageModel.load(weights, None, FP32)


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    weights = save_language(tmp_path / "lm")
    for file in (tmp_path / "lm").glob("*token*"):
        file.unlink()
    tokenizer().save_pretrained(tmp_path / "tokens")
    language = LanguageModel.load(weights, str(tmp_path / "tokens"), FP32)
    assert len(language.tokenizer) == 261
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_stays_what_it_is_whatever_the_family(tmp_path: Path, family: str) -> None:
    """By its model_type a qwen2 would be given Qwen2's class, and with it one token more."""
    found = load_tokenizer(save_language(tmp_path, family))
    assert found.backend_tokenizer.to_str() == tokenizer().backend_tokenizer.to_str()


def test_folders_that_hold_no_language_model(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    tokenizer().save_pretrained(tmp_path / "tower")
    with pytest.raises(UserError, match="a clip_vision_model is no causal language model"):
        LanguageModel.load(str(tmp_path / "tower"), None, FP32)


def test_created_from_a_config(tmp_path: Path) -> None:
    """The tokenizer gives vocabulary size and special ids, unless the config names its own."""
    tokenizer().save_pretrained(tmp_path / "tokens")
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    language = LanguageModel.create(config, str(tmp_path / "tokens"))
    assert language.hf.config.vocab_size == 261 and language.hf.config.eos_token_id == 2
    larger = LanguageModel.create({**config, "vocab_size": 300, "eos_token_id": 4}, str(tmp_path / "tokens"))
    assert larger.hf.config.vocab_size == 300 and larger.hf.config.eos_token_id == 4


SMALL = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "'model_type' is missing"),
        ({"model_type": "lama"}, "no model_type 'lama'"),
        ({"model_type": []}, "no model_type"),
        ({**SMALL, "hiden_size": 8}, r"unknown field 'hiden_size'\n.*'hidden_size'"),
        ({**SMALL, "model_type": "gpt2", "n_layers": 1}, "unknown field '(intermediate_size|n_layers)'"),
        ({**SMALL, "hidden_size": "8"}, "refused by transformers: .*'hidden_size' expected int"),
        ({**SMALL, "num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({**SMALL, "hidden_act": "glu"}, "refused by transformers: KeyError: 'glu'"),
        ({**SMALL, "intermediate_size": -1}, "negative dimension"),
        ({"model_type": "clip_vision_model"}, "a clip_vision_model is no causal language model"),
    ],
)
def test_faulty_configs(tmp_path: Path, config: dict[str, object], message: str) -> None:
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        LanguageModel.create(config, str(tmp_path))
    assert {fault.where for fault in raised.value.faults} == {"model.language.config"}


@pytest.mark.parametrize(
    "config",
    [
        {**SMALL, "rope_theta": 5e5},  # of transformers 4, and in every published Llama config
        {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "gpt2", "hidden_size": 8, "n_head": 2, "num_hidden_layers": 1},  # either name
    ],
)
def test_fields_by_their_other_names(tmp_path: Path, config: dict[str, object]) -> None:
    tokenizer().save_pretrained(tmp_path)
    made = LanguageModel.create(config, str(tmp_path)).hf.config
    assert made.hidden_size == 8
    if made.model_type == "llama":
        assert made.rope_parameters["rope_theta"] == config.get("rope_theta", 10_000)
        assert made.rope_parameters["rope_type"] == ("linear" if "rope_scaling" in config else "default")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    language = LanguageModel.load(save_language(tmp_path / "lm", tie_word_embeddings=tied), None, FP32)
    language.save(tmp_path / "saved")
    again = LanguageModel.load(str(tmp_path / "saved"), None, FP32)
    before, after = language.hf.state_dict(), again.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.tokenizer.get_vocab() == language.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == language.tokenizer.chat_template


class Touches:
    """What a pickle may do to a machine that loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def test_bin_files_are_read_as_tensors_alone(tmp_path: Path) -> None:
    weights = save_language(tmp_path / "lm")
    kept = load_file(tmp_path / "lm/model.safetensors")
    (tmp_path / "lm/model.safetensors").unlink()
    torch.save(kept, tmp_path / "lm/pytorch_model.bin")
    found = LanguageModel.load(weights, None, FP32).hf.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    with torch.device("meta"):
        LanguageModel.load(weights, None, FP32)

    torch.save({**kept, "lm_head.weight": Touches(tmp_path / "ran")}, tmp_path / "lm/pytorch_model.bin")
    with pytest.raises(UserError, match="broken or holds more than tensors"):
        LanguageModel.load(weights, None, FP32)
    assert not (tmp_path / "ran").exists()


def test_a_sentencepiece_model_without_the_packages_that_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("mmtune.parts.language._installed", lambda package: package != "protobuf")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert "SentencePiece model, and protobuf is not installed" in caught.value.faults[0].what
    assert "mmtune[llava]" in caught.value.faults[0].mend

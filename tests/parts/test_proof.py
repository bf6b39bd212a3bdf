"""What a language model has to be, and families that are not: each is refused for what it does otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mmtune.core.errors import UserError
from mmtune.data.chat import Turn
from mmtune.parts.language import LanguageModel
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.proof import prove, require_plain
from mmtune.tuning.lora import find_targets
from tests import tiny_models as tiny

LLAMA = tiny.FAMILIES["llama"]
MULTI_HEAD = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
HEADS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Each layer adds an embedding of the token itself, which a picture has none of.
GEMMA_3N: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["full_attention"] * 2,
}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokens")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def made(family: str, fields: dict[str, Any], tokens: str) -> LanguageModel:
    torch.manual_seed(1)
    language = LanguageModel.create({"model_type": family, **fields}, tokens)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return language


@pytest.mark.parametrize(
    ("family", "fields", "wrong"),
    [
        ("gemma3n_text", GEMMA_3N, ["logits of embeddings and of token ids"]),
        ("bert", MULTI_HEAD, ["logits by mmtune and by its own class", "logits before and after"]),
        ("bert", {**MULTI_HEAD, "is_decoder": True}, ["logits by mmtune and by its own class"]),
    ],
    ids=["ids in every layer", "looks ahead", "a head of two layers"],
)
def test_a_model_that_is_another_kind_is_refused(
    tokens: str, family: str, fields: dict[str, Any], wrong: list[str]
) -> None:
    language = made(family, fields, tokens).train()
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=f"a {family} cannot be trained by mmtune") as caught:
        require_plain(language)
    said = [fault.what for fault in caught.value.faults]
    assert all(any(what in each for each in said) for what in wrong)
    assert language.hf.training and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama4_text", {**LLAMA, "head_dim": 8, "num_local_experts": 2}, "no body apart from its head"),
        ("falcon_h1", {**LLAMA, "mamba_d_ssm": 32, "mamba_n_heads": 4}, "it answers to token ids alone"),
    ],
)
def test_a_class_that_lacks_something_is_refused_at_once(
    tokens: str, family: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=f"a {family} cannot be used: .*{reason}"):
        LanguageModel.create({"model_type": family, **fields}, tokens)


def test_a_model_with_a_tower_of_its_own_is_refused_before_its_weights(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "architectures": ["Gemma3Model"]}')
    with pytest.raises(UserError, match="a gemma3 is a language model with a tower of its own around it"):
        LanguageModel.load(str(tmp_path), None, torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "hunyuan_v1_dense"])
def test_positions_that_count_padding_along_are_counted_for_them(tokens: str, family: str) -> None:
    """Learned positions, and rotary ones that don't cancel: both start at a row's first token."""
    fields = {"n_head": 4, "n_layer": 2, "n_embd": 32} if family == "gpt2" else {**LLAMA, "head_dim": 8}
    language = made(family, fields, tokens)
    assert all(each.sound for each in prove(language))
    language.takes_positions = False
    assert [each.what for each in prove(language) if not each.sound] == [
        "logits with padding on the left and without"
    ]


def test_of_a_mixture_of_experts_targets_are_named(tokens: str) -> None:
    """Its experts are stacks of matrices: a LoRA on "all-linear" would leave most of the model out."""
    language = made("mixtral", EXPERTS, tokens)
    assert all(each.sound for each in prove(language))
    with pytest.raises(
        UserError, match=r"4 weights are stacks of matrices, .*experts\.gate_up_proj"
    ) as caught:
        find_targets(language.hf, "all-linear", "tune.language.targets")
    assert "model.layers.*.self_attn.q_proj" in caught.value.faults[0].mend
    assert len(find_targets(language.hf, ["model.layers.*.self_attn.*"], "")) == 8


def test_a_gpt2_has_no_linear_layer_but_its_head(tokens: str) -> None:
    language = made("gpt2", {"n_head": 4, "n_layer": 1, "n_embd": 32}, tokens)
    with pytest.raises(UserError, match="no linear layer to adapt but its head"):
        find_targets(language.hf, "all-linear", "tune.language.targets")


# Tokens


def test_a_token_that_was_added_to_the_tokenizer_alone(tmp_path: Path) -> None:
    weights = tiny.save_language(tmp_path, vocab_size=261)
    larger = tiny.tokenizer()
    larger.add_tokens(["<image>"], special_tokens=True)
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"262 tokens, the model only 261 embeddings; .* <image>") as caught:
        LanguageModel.load(weights, None, torch.float32)
    assert "mmtune needs no token for a picture" in caught.value.faults[0].mend


@pytest.mark.parametrize("resized", [False, True], ids=["padded", "resized"])
def test_an_image_token_of_the_tokenizer_is_never_used(tmp_path: Path, resized: bool) -> None:
    """Its embedding lies inside the padding, or the embeddings were resized to it: a picture's places are the
    same as without it, and so is what the model says.
    """
    plain = tiny.model(tmp_path / "plain")
    assert plain.options.language and plain.options.language.weights
    folder = Path(plain.options.language.weights)
    question, asked = [Turn("user", "<image> What?")], tiny.batch([1, 0, 2], left=True)
    expected, prompt = plain.generate(asked, 6), plain.chat.prompt(question)
    larger = tiny.tokenizer()
    larger.add_tokens(["<image>"], special_tokens=True)
    larger.save_pretrained(folder)
    if resized:
        hf = plain.language.hf
        hf.resize_token_embeddings(len(larger), mean_resizing=False)
        hf.save_pretrained(folder)
    language = LanguageModel.load(str(folder), None, torch.float32)
    assert language.tokenizer.convert_tokens_to_ids("<image>") == 261
    assert language.hf.get_input_embeddings().num_embeddings == (262 if resized else tiny.VOCABULARY)
    again = VisionLanguageModel(plain.vision, plain.connector, language, plain.options)
    assert again.chat.prompt(question) == prompt
    assert again.generate(asked, 6) == expected


def test_a_vocabulary_with_gaps_has_an_embedding_for_its_last_token(tmp_path: Path) -> None:
    vocabulary = {token: 2 * i for token, i in tiny.tokenizer().get_vocab().items()}
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))
    gapped.save_pretrained(tmp_path)
    assert made("llama", HEADS, str(tmp_path)).hf.config.vocab_size == 521
    with pytest.raises(UserError, match="261 tokens, the model only 300 embeddings"):
        made("llama", {**HEADS, "vocab_size": 300}, str(tmp_path))

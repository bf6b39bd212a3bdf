"""Which attention a part is given. No GPU here: what a GPU with flash-attn would say is put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.core.errors import UserError
from mmtune.parts import attention
from mmtune.parts.attention import attention_for, say_attention
from mmtune.parts.language import LanguageModel
from mmtune.parts.model import VisionLanguageModel, assemble, load_part
from mmtune.parts.spec import ModelOptions
from mmtune.training.rehearsal import Shape, rehearse
from tests import tiny_models as tiny

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny.model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny.model(tmp_path_factory.mktemp("gemma2"), "gemma2")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA and flash-attn, as far as the choice goes."""
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_greater_or_equal", lambda version: True)


def test_without_a_gpu_it_is_sdpa_where_that_says_all(
    llama: VisionLanguageModel, gemma2: VisionLanguageModel
) -> None:
    assert llama.attention == {"vision": "sdpa", "language": "sdpa"}
    assert llama.language.hf.config._attn_implementation == "sdpa"
    assert gemma2.attention == {"vision": "sdpa", "language": "eager"}
    assert gemma2.language.hf.config._attn_implementation == "eager"
    assert say_attention(gemma2.attention) == "attention: vision sdpa, language eager"


def test_sdpa_is_refused_where_it_would_leave_out_the_soft_cap(
    gemma2: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the class of transformers 5.17, which says that it supports it."""
    monkeypatch.setattr(type(gemma2.language.hf), "_supports_sdpa", True)
    with pytest.raises(UserError) as caught:
        attention_for(gemma2.language, "sdpa", FP32)
    assert "sdpa leaves out the soft-cap" in caught.value.faults[0].what
    assert (caught.value.faults[0].where, "Say auto" in caught.value.faults[0].mend) == (
        "model.attention",
        True,
    )
    monkeypatch.setattr(gemma2.language.hf.config, "attn_logit_softcapping", None)
    assert attention_for(gemma2.language, "sdpa", FP32) == "sdpa"


def test_eager_and_sdpa_agree_and_are_two(llama: VisionLanguageModel) -> None:
    batch = tiny.batch([1, 0, 2])
    with torch.no_grad():
        by_sdpa = llama.language.hidden(llama.splice(batch), batch.attention_mask)
        llama.attend_by("eager", {"vision": FP32, "language": FP32})
        by_hand = llama.language.hidden(llama.splice(batch), batch.attention_mask)
        llama.attend_by("auto", {"vision": FP32, "language": FP32})
    real = batch.attention_mask.bool()
    torch.testing.assert_close(by_sdpa[real], by_hand[real], rtol=1e-4, atol=1e-4)
    assert not torch.equal(by_sdpa[real], by_hand[real])


@pytest.mark.usefixtures("gpu")
def test_flash_is_taken_where_all_is_there(llama: VisionLanguageModel, gemma2: VisionLanguageModel) -> None:
    assert [attention_for(each.language, "auto", BF16) for each in (llama, gemma2)] == ["flash", "flash"]
    assert attention_for(llama.language, "auto", FP32) == "sdpa"
    assert attention_for(llama.vision, "auto", BF16) == "flash"
    elsewhere = torch.nn.Module()  # a tower of another library
    elsewhere.hf = torch.nn.Linear(1, 1)
    assert attention_for(elsewhere, "auto", BF16) == "sdpa"


@pytest.mark.parametrize(
    ("lacking", "dtype", "reason"),
    [
        ("", FP32, "it is held in float32, and flash attention takes half precision"),
        ("torch.cuda.is_available", BF16, "there is no CUDA device"),
        ("is_flash_attn_2_available", BF16, "the package flash-attn, 2.6 or newer, is not installed"),
        ("is_flash_attn_greater_or_equal", BF16, "2.6 or newer"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_flash_is_refused_with_the_reason(
    llama: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, lacking: str, dtype: Any, reason: str
) -> None:
    if lacking:
        monkeypatch.setattr(f"mmtune.parts.attention.{lacking}", lambda *_: False)
    with pytest.raises(UserError, match="flash is not to be had for the LlamaForCausalLM") as caught:
        attention_for(llama.language, "flash", dtype)
    assert reason in caught.value.faults[0].what


def test_flash_by_its_name_in_transformers_and_never_on_fake_tensors(
    llama: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsed by sdpa, which keeps as much, and then as it was."""
    asked: list[str] = []
    monkeypatch.setattr(llama.language, "attend_by", asked.append)
    monkeypatch.setitem(llama.attention, "language", "flash")
    llama.connector.requires_grad_(True)
    rehearse(llama, Shape(1, 8, 1, 2), bf16=True, checkpointing=False)
    assert asked == ["sdpa", "flash_attention_2"]


def test_a_family_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": tiny.WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 264}
    tiny.tokenizer().save_pretrained(tmp_path)
    falcon = LanguageModel.create({"model_type": "falcon", **small}, str(tmp_path))
    assert attention_for(falcon, "auto", FP32) == falcon.hf.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="a falcon computes attention by sdpa and cannot be told otherwise"):
        falcon.attend_by("eager")


def test_a_part_put_in_attends_like_the_one_it_replaces(llama: VisionLanguageModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    options = ModelOptions(base=str(tmp_path), attention="eager")
    part = load_part(tmp_path, "language", assemble(options))
    assert part.hf.config._attn_implementation == "eager"  # type: ignore[union-attr]

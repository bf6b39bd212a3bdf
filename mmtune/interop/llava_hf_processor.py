"""The processor of an exported llava-hf folder: tokenizer, pictures and chat template that give mmtune's own
inputs, and the comparison that shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json
from mmtune.data.chat import IMAGE, IMAGE_ID, Turn
from mmtune.interop.chat_templates import taking_lists, vicuna
from mmtune.interop.comparison import CONVERSATIONS, Compared, pictures
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.vision.pixels import said_of

PIXELS = 1e-6  # of the largest: what normalising in another order may make


def write_processor(model: VisionLanguageModel, folder: Path) -> int:
    """Writes tokenizer, image processor and chat template. Returns the id of the token for a picture, which
    is added to the tokenizer where it has none; the model's own tokenizer stays as it is.
    """
    chat, transform = model.chat, model.transform
    tokenizer = _copy(chat.tokenizer)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tokenizer.padding_side = "left"
    own = str(tokenizer.chat_template)
    if chat.format == "vicuna_v1":
        tokenizer.chat_template = vicuna(spaces=chat.dummy_space and not chat.dummy_after_special)
    else:
        tokenizer.chat_template = taking_lists(tokenizer, own)
    tokenizer.save_pretrained(folder)
    _for_older_versions(folder / "tokenizer_config.json")
    preprocessor = {
        "image_processor_type": "LlavaImageProcessor" if transform.fit == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        **({"do_pad": True} if transform.fit == "pad" else {}),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **said_of(transform),
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": model.vision.patch,
        "num_additional_image_tokens": 1,  # the CLS token, which `default` leaves out again
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "processor_config.json", processor)
    return tokenizer.get_vocab()[IMAGE]


def prompts(model: VisionLanguageModel) -> list[list[int]]:
    """mmtune's own ids of the conversations that `compare_processor` shows to the processor."""
    return [model.chat.prompt(turns) for turns in _exchanges()]


def compare_processor(
    folder: Path, expected: Sequence[Sequence[int]], image: int, pixels: torch.Tensor
) -> list[Compared]:
    """The ids and pixels that the folder's processor makes of the probe's questions, beside mmtune's.

    expected: of `prompts`. image: the id of the token for a picture. pixels: mmtune's, normalised. The last
    row is the processor on torchvision, which transformers takes where it is installed; it resizes otherwise
    than PIL, so any difference is allowed.
    """
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    drawn = iter(pictures())
    different = total = 0
    shown = []
    for turns, ids in zip(_exchanges(), expected, strict=True):
        made = _asked(processor, turns, drawn)
        theirs, mine = made["input_ids"][0].tolist(), [image if i == IMAGE_ID else i for i in ids]
        total += max(len(theirs), len(mine))
        different += max(len(theirs), len(mine)) - _alike(theirs, mine)
        shown += [made["pixel_values"]] if "pixel_values" in made else []
    rows = [Compared("ids, its chat template", different, different / total, total - different, total, 0.0)]
    rows.append(_pixels("pixels, its processor", pixels, torch.cat(shown)[: len(pixels)], PIXELS))
    fast = AutoProcessor.from_pretrained(
        folder, backend="torchvision", trust_remote_code=False
    ).image_processor
    made = fast(pictures()[: len(pixels)], return_tensors="pt")
    rows.append(_pixels("pixels, on torchvision", pixels, made["pixel_values"], None))
    return rows


def _exchanges() -> list[list[Turn]]:
    """The probe's questions, and one that follows an answer."""
    asked = [[Turn("user", question)] for question, _ in CONVERSATIONS]
    question, answer = CONVERSATIONS[0]
    return [*asked, [Turn("user", question), Turn("assistant", answer), Turn("user", "And of Italy?")]]


def _asked(processor: Any, turns: Sequence[Turn], drawn: Any) -> Any:
    messages = []
    for turn in turns:
        content: list[dict[str, Any]] = [
            {"type": "image", "image": next(drawn)} for _ in range(turn.text.count(IMAGE))
        ]
        content.append({"type": "text", "text": turn.text.replace(f"{IMAGE}\n", "")})
        messages.append({"role": turn.role, "content": content})
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def _pixels(what: str, mine: torch.Tensor, theirs: torch.Tensor, tolerance: float | None) -> Compared:
    gone = (theirs.float() - mine.cpu()).abs()
    largest = float(mine.abs().max())
    same = int((gone <= PIXELS * largest).sum())
    return Compared(what, float(gone.max()), float(gone.max()) / largest, same, mine.numel(), tolerance)


def _copy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """A tokenizer that is read from tokenizer.json alone, whatever class transformers would make of it.

    Read as LlamaTokenizer, transformers 5 puts SentencePiece's dummy space where `legacy` says, whatever
    stands in tokenizer.json.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "the tokenizer has no tokenizer.json",
            where=tokenizer.name_or_path,
            mend="Convert it: AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR).",
        )
    backend = Tokenizer.from_str(backend.to_str())
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        **special,
    )
    made.chat_template = tokenizer.chat_template
    return made


def _for_older_versions(file: Path) -> None:
    """transformers 4.x knows neither the class that 5.x names nor a list of extra special tokens."""
    config = read_json(file)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra
    write_json(file, config)

"""The tiny model's tokenizer: byte-level BPE, trained on the tiny world, with a chat template.

Capitals and digits are always tokens of their own, so that a sign's letters can be spelled and sums
carried out whatever words the training text happens to hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mmtune.core.files import read_json
from mmtune.data.chat import IMAGE

VOCABULARY = 384
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|system|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(world: Path, folder: Path) -> None:
    """Trains on the world's training files and writes a Hugging Face tokenizer, whole or not at all.

    One that is there already is left alone; a folder without a tokenizer_config.json holds none.
    """
    if (folder / "tokenizer_config.json").is_file():
        return
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[3:],
    )
    wrapped.chat_template = TEMPLATE
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    wrapped.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _texts(world: Path) -> Iterator[str]:
    for name in (
        "train_simple.json",
        "train_cells.json",
        "train_captions.json",
        "train_instructions.json",
        "train_iconqa.json",
        "train_letters.json",
    ):
        for row in read_json(world / name):
            for turn in row["conversations"]:
                yield turn["value"].replace(IMAGE, "")

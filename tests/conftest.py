"""What several tests need: tokenizers of the families we serve, made on the spot, and the real data."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The same examples on every machine and in every run; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What colour is the circle in the middle? It is red.\nHow many are there? Three.\n\nNone.",
    "user assistant system USER ASSISTANT Human: Assistant: [INST] [/INST]",
    "Is there a cat to the left of the tree?\nYes!\nIs it a dog?\nNo, the dog is behind it; 12 of 345.",
    "Answer the question using a single word or phrase.\nIl était une fois à Paris.",
]

# The pretokeniser of Llama 3 and Qwen 2: a punctuation mark takes the line breaks after it along.
BYTE_LEVEL_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]

# name -> (chat template, the token that ends a turn)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}",
        "</s>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
        "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}",
        "</s>",
    ),
    "words": (
        "{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }}\n"
        "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
        "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}",
        "</s>",
    ),
}
# byte_level: as Llama 3 and Qwen. The others are Llama's SentencePiece model in its three conversions,
# which differ in where a text gets its dummy space: before each stretch between special tokens, unless
# it starts with one (always); likewise, but there too (prepend); at the text's very beginning (first).
FAMILIES = ("byte_level", "llama_always", "llama_prepend", "llama_first")

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BYTE_LEVEL_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


@cache
def _llama(prefix: str) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Learned word by word, as SentencePiece does, so that a space can only begin a token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", "always", split=True), pre_tokenizers.Punctuation("isolated")]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *every_byte], show_progress=False)
    tokenizer.train_from_iterator([s.replace("\n", " ") for s in SENTENCES], trainer)
    # The model alone: bytes are no special tokens, and merges no longer stop at words.
    bare = Tokenizer(tokenizer.model)
    bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if prefix == "prepend":
        bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bare.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    bare.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return bare.to_str()


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Takes what was imported out of garbage collection: each training ends in two, of 0.7 s otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def thawed() -> Iterator[None]:
    """At the end all is collected again, or libraries that count what they leave behind complain."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(family, template or None): one of FAMILIES with one of TEMPLATES."""

    def make(family: str, template: str | None = None, **special: object) -> PreTrainedTokenizerBase:
        stored = _byte_level() if family == "byte_level" else _llama(family.removeprefix("llama_"))
        text, end = TEMPLATES[template] if template else (None, "</s>")
        options = {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>", **special}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(stored), clean_up_tokenization_spaces=False, **options
        )
        tokenizer.chat_template = text
        return tokenizer

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real samples, or a skip with the reason."""
    folder = os.environ.get("MMTUNE_REAL_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MMTUNE_REAL_DATA names no folder of real samples")
    return Path(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tiny world under datasets/tiny and a random model, base. Only to be read."""
    from tests.world import build

    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder

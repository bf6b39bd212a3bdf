"""Labels cover exactly what the assistant said, whatever anybody says, for tokenizers of five kinds.

Elsewhere the texts are made of ordinary words; here they are any Unicode, with placeholders and the
tokenizer's own special tokens anywhere in them, and they may be empty or begin and end with white space.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmtune.data.chat import IGNORE, IMAGE, IMAGE_ID, Chat, Turn
from tests.conftest import SENTENCES, SPECIAL, TEMPLATES

PLACES = 3  # tokens of a picture
# A tokenizer of each kind, with a template of each kind. For what stands before an answer and after it
# see the templates.
SETTINGS = {
    "byte_level": ("chatml", "", "<|im_end|>"),
    "llama_first": ("llama3", "", "<|eot_id|>"),
    "llama_always": ("llama2", " ", " </s>"),
    "unigram": ("mistral", " ", "</s>"),
    "wordpiece": ("words", "", "</s>"),
}


@cache
def _unigram() -> str:
    """As SentencePiece's Unigram models with bytes for what they don't know."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *every_byte], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([s.replace("\n", " ") for s in SENTENCES], trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores = [(token, score if token not in every_byte else -20.0) for token, score in learned]
    bare = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    bare.add_special_tokens(list(SPECIAL))
    bare.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return bare.to_str()


@cache
def _wordpiece() -> str:
    """As BERT's, cased: white space is lost and words it cannot spell become <unk>."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def _tokenizer(kind: str, make_tokenizer: Any) -> Any:
    template = SETTINGS[kind][0]
    if kind not in ("unigram", "wordpiece"):
        return make_tokenizer(kind, template)
    text, end = TEMPLATES[template]
    stored = _unigram() if kind == "unigram" else _wordpiece()
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(stored),
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = text
    return made


@pytest.fixture(scope="module", params=SETTINGS)
def chat(request: pytest.FixtureRequest, make_tokenizer: Any) -> tuple[str, Chat]:
    return request.param, Chat(_tokenizer(request.param, make_tokenizer), "template", PLACES)


# U+2581 is SentencePiece's own mark for a space, which no decoder gives back.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
alike = st.sampled_from([*SPECIAL, "[INST]", "[/INST]", "[[turn-0]]", "[[turn-1]]", "<0x0A>", "<im", "age>"])
words = st.sampled_from(["What", "colour", "is", " ", "  ", "\n", "12", ".", "It"])
anything = st.lists(st.text(characters, max_size=6) | alike | words, max_size=6).map("".join)
speech = anything.map(lambda text: text.replace(IMAGE, ""))  # of those who may not show a picture


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """One to four exchanges, perhaps with a system's turn, with pictures anywhere in a question."""
    turns = [Turn("system", draw(speech))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        asked = IMAGE.join(draw(st.lists(speech, min_size=1, max_size=3)))
        turns += [Turn("user", asked), Turn("assistant", draw(speech))]
    return turns


def spans(labels: list[int]) -> list[list[int]]:
    """The runs of supervised ids."""
    found: list[list[int]] = []
    for before, label in pairwise([IGNORE, *labels]):
        if label != IGNORE:
            if before == IGNORE:
                found.append([])
            found[-1].append(label)
    return found


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids as it is in the middle of a text: no space at the front is lost."""
    line = tokenizer("\n", add_special_tokens=False).input_ids
    return str(tokenizer.decode(line + ids)).removeprefix("\n")


@given(turns=conversations())
@settings(max_examples=100)
def test_labels_are_what_the_assistant_said(chat: tuple[str, Chat], turns: list[Turn]) -> None:
    kind, made = chat
    # The library's Unigram reads a byte's name in a text as that byte.
    assume(kind != "unigram" or not any("<0x" in turn.text for turn in turns))
    ids, labels = made.encode(turns)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    assert ids.count(IMAGE_ID) == PLACES * sum(turn.text.count(IMAGE) for turn in turns)
    assert IMAGE_ID not in labels
    _, before, after = SETTINGS[kind]
    said = [turn.text for turn in turns if turn.role == "assistant"]
    tokenizer = made.tokenizer
    if kind == "wordpiece":  # white space means nothing to it, so each answer stands by itself
        end = tokenizer.convert_tokens_to_ids(after)
        own = [tokenizer(t, add_special_tokens=False, split_special_tokens=True).input_ids for t in said]
        assert spans(labels) == [[*answer, end] for answer in own]
    else:
        assert [decoded(tokenizer, span) for span in spans(labels)] == [before + t + after for t in said]


@given(turns=conversations())
@settings(max_examples=40)
def test_a_prompt_begins_its_conversation_and_the_answer_follows(
    chat: tuple[str, Chat], turns: list[Turn]
) -> None:
    _, made = chat
    ids, labels = made.encode(turns)
    for i, turn in enumerate(turns):
        if turn.role == "user":
            prompt = made.prompt(turns[: i + 1])
            assert ids[: len(prompt)] == prompt
            assert labels[len(prompt)] != IGNORE


@given(turns=conversations())
@settings(max_examples=40)
def test_nobody_says_a_special_token(chat: tuple[str, Chat], turns: list[Turn]) -> None:
    """There are as many as in a conversation of the same turns in which nothing is said."""
    _, made = chat
    unknown = made.tokenizer.unk_token_id  # WordPiece writes it for a word it cannot spell
    special = {i for i, token in made.tokenizer.added_tokens_decoder.items() if token.special} - {unknown}
    silent = [Turn(turn.role, "x") for turn in turns]
    ids = [made.encode(each)[0] for each in (turns, silent)]
    assert [i for i in ids[0] if i in special] == [i for i in ids[1] if i in special]

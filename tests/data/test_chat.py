"""Ids and labels of conversations, against the tokenizers' own tokenisation of the whole text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data.chat import IGNORE, IMAGE, IMAGE_ID, VICUNA_SYSTEM, Chat, Turn

FAMILIES = ("byte_level", "llama_always", "llama_prepend", "llama_first")
# name -> (what stands before an answer, what after it)
ANSWERS = {
    "chatml": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "llama2": (" ", " </s>"),
    "words": (" ", "</s>"),
}
PLACES = 3  # tokens of a picture

words = st.sampled_from(
    [
        "What",
        "colour",
        "is",
        "it",
        "12",
        "Yes",
        "x",
        "né",
        "\u4f60",
        "\U0001f408",
        "a.",
        "?",
        "[b]",
        "\n",
        "  ",
        "'s",
        ">",
        ":",
    ]
)
anything = st.lists(words, max_size=8).map(" ".join) | st.lists(words, max_size=8).map("".join)
# An answer's outer white space lies at the border, where the prompt must stay a prefix whatever would merge.
answers = anything.map(str.strip).filter(bool)


@st.composite
def conversations(draw: st.DrawFn, pictures: bool = True) -> list[Turn]:
    """One to three exchanges, perhaps with a system's turn, perhaps with pictures anywhere in a question."""
    turns = [Turn("system", draw(answers))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(anything)
        for _ in range(draw(st.integers(0, 2)) if pictures else 0):
            place = draw(st.integers(0, len(question)))
            if IMAGE not in question or not _within_placeholder(question, place):
                question = question[:place] + IMAGE + question[place:]
        turns += [Turn("user", question), Turn("assistant", draw(answers))]
    return turns


def _within_placeholder(text: str, place: int) -> bool:
    return any(
        text.startswith(IMAGE, i) and i < place < i + len(IMAGE)
        for i in range(max(0, place - len(IMAGE)), place)
    )


def _spans(labels: list[int]) -> list[list[int]]:
    """The runs of supervised ids."""
    spans: list[list[int]] = []
    for before, label in pairwise([IGNORE, *labels]):
        if label != IGNORE:
            if before == IGNORE:
                spans.append([])
            spans[-1].append(label)
    return spans


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids as it is in the middle of a text: no space at the front is lost."""
    line = tokenizer("\n", add_special_tokens=False).input_ids
    return tokenizer.decode(line + ids).removeprefix("\n")


def _whole(tokenizer: Any, text: str) -> list[int]:
    """The tokenizer's own ids of a whole text, with the placeholder as a special token, then repeated."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    picture = tokenizer.convert_tokens_to_ids(IMAGE)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [i for token in ids for i in ([IMAGE_ID] * PLACES if token == picture else [token])]


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.fixture(scope="module", params=[(f, t) for f in FAMILIES for t in ANSWERS], ids="-".join)
def setting(request: pytest.FixtureRequest, make_tokenizer: Any) -> tuple[str, Chat, Any]:
    """A template's name, a Chat with it, and a second tokenizer like it, for reference."""
    family, template = request.param
    chat = Chat(make_tokenizer(family, template), "template", PLACES)
    return template, chat, make_tokenizer(family, template)


@given(turns=conversations())
@settings(max_examples=25, deadline=None)
def test_labels_are_what_the_assistant_said_and_its_end(
    setting: tuple[str, Chat, Any], turns: list[Turn]
) -> None:
    template, chat, _ = setting
    before, after = ANSWERS[template]
    ids, labels = chat.encode(turns)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    said = [turn.text for turn in turns if turn.role == "assistant"]
    found = [_decoded(chat.tokenizer, span) for span in _spans(labels)]
    assert found == [before + text + after for text in said]


@given(turns=conversations())
@settings(max_examples=25, deadline=None)
def test_ids_are_the_tokenizers_own_of_the_rendered_template(
    setting: tuple[str, Chat, Any], turns: list[Turn]
) -> None:
    _, chat, reference = setting
    rendered = reference.apply_chat_template(_messages(turns), tokenize=False)
    assert chat.encode(turns)[0] == _whole(reference, rendered)


@given(turns=conversations())
@settings(max_examples=15, deadline=None)
def test_every_prompt_is_a_prefix_of_its_conversation(
    setting: tuple[str, Chat, Any], turns: list[Turn]
) -> None:
    _, chat, _ = setting
    ids, labels = chat.encode(turns)
    starts = [i for i, (a, b) in enumerate(pairwise([IGNORE, *labels])) if a == IGNORE != b]
    asked = [turns[: i + 1] for i, turn in enumerate(turns) if turn.role == "user"]
    for question, start in zip(asked, starts, strict=True):
        assert chat.prompt(question) == ids[:start]


@given(turns=conversations(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_special_tokens_in_speech_stay_text(
    setting: tuple[str, Chat, Any], turns: list[Turn], data: st.DataObject
) -> None:
    _, chat, _ = setting
    tokenizer = chat.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    count = [sum(i in special for i in chat.encode(turns)[0])]
    token = data.draw(st.sampled_from(sorted(map(tokenizer.convert_ids_to_tokens, special - {0}))))
    spiked = [Turn(turn.role, f"{turn.text}{token} b{token}") for turn in turns]
    ids, labels = chat.encode(spiked)
    assert [sum(i in special for i in ids)] == count
    assert sum(i in special for i in labels) == sum(turn.role == "assistant" for turn in turns)


# --- templates that trim -------------------------------------------------------------------------------

# Whose texts are trimmed, as by Llama 3 and Gemma, by Mistral, and by Llama 2.
TRIMMED = {"everybody": "true", "assistant": "m['role'] == 'assistant'", "others": "m['role'] != 'system'"}
blank = st.sampled_from(["", " ", "\n", " \n "])


@st.composite
def padded(draw: st.DrawFn) -> list[Turn]:
    return [Turn(t.role, draw(blank) + t.text + draw(blank)) for t in draw(conversations())]


@pytest.fixture(
    scope="module", params=[(t, who) for t in ("llama3", "mistral") for who in TRIMMED], ids="-".join
)
def trimming(request: pytest.FixtureRequest, make_tokenizer: Any) -> tuple[Chat, Any]:
    template, who = request.param
    pair = make_tokenizer("byte_level", template), make_tokenizer("byte_level", template)
    for tokenizer in pair:
        trimmed = f"(m['content'] | trim if {TRIMMED[who]} else m['content'])"
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", trimmed)
    return Chat(pair[0], "template", PLACES), pair[1]


@given(turns=padded())
@settings(max_examples=40, deadline=None)
def test_ids_are_those_of_a_template_that_trims(trimming: tuple[Chat, Any], turns: list[Turn]) -> None:
    chat, reference = trimming
    rendered = reference.apply_chat_template(_messages(turns), tokenize=False)
    ids, labels = chat.encode(turns)
    assert ids == _whole(reference, rendered)
    said = [_decoded(chat.tokenizer, span) for span in _spans(labels)]
    ends = [turn.text.strip() + chat.tokenizer.eos_token for turn in turns if turn.role == "assistant"]
    assert [text.removeprefix(" ") for text in said] == ends
    for i, turn in enumerate(turns):
        if turn.role == "user":
            prompt = chat.prompt(turns[: i + 1])
            assert prompt == ids[: len(prompt)]
            assert labels[len(prompt)] != IGNORE


# --- vicuna_v1 -----------------------------------------------------------------------------------------


def llava_ids(tokenizer: Any, turns: list[Turn]) -> list[int]:
    """LLaVA-1.5's tokenisation, restated from its published behaviour.

    The conversation is written as one text with the separators " " and "</s>", split at `<image>`, and
    each chunk is given to the slow Llama tokenizer: BOS, then the SentencePiece ids of each stretch between
    special tokens, with a dummy space before the first, and, where the tokenizer is a `legacy` one, before
    the others. The first chunk's BOS is kept, the others' are dropped.
    """
    legacy = tokenizer.tokenize("</s>x")[1:] == tokenizer.tokenize("x")
    system = VICUNA_SYSTEM
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    text = system + " "
    for turn in turns:
        text += f"USER: {turn.text} " if turn.role == "user" else f"ASSISTANT: {turn.text}</s>"
    ids: list[int] = [tokenizer.bos_token_id]
    for i, chunk in enumerate(text.split("<image>")):
        if i:
            ids += [IMAGE_ID] * PLACES
        for j, stretch in enumerate(chunk.split("</s>")):
            if j:
                ids.append(tokenizer.eos_token_id)
            if stretch:
                ids += _sentencepiece(tokenizer, stretch, dummy=legacy or j == 0)
    return ids


def _sentencepiece(tokenizer: Any, text: str, dummy: bool = True) -> list[int]:
    """The bare BPE model on the text, with its dummy space or without; what stands before it left aside."""
    model = tokenizer.backend_tokenizer.model
    return [token.id for token in model.tokenize("\u2581" * dummy + text.replace(" ", "\u2581"))]


@pytest.fixture(scope="module", params=FAMILIES[1:])
def vicuna(request: pytest.FixtureRequest, make_tokenizer: Any) -> Chat:
    return Chat(make_tokenizer(request.param), "vicuna_v1", PLACES)


@given(turns=conversations())
@settings(max_examples=150, deadline=None)
def test_vicuna_ids_are_llavas(vicuna: Chat, turns: list[Turn]) -> None:
    assert vicuna.encode(turns)[0] == llava_ids(vicuna.tokenizer, turns)


@pytest.mark.parametrize(
    "question",
    [
        f"{IMAGE}\nWhat is it?",
        f"What is it?\n{IMAGE}",
        f"Look {IMAGE} here",
        f"{IMAGE}{IMAGE}Two?",
        f"{IMAGE} and {IMAGE}",
        IMAGE,
        "No picture?",
        "",
        " spaces  ",
    ],
)
def test_vicuna_ids_are_llavas_wherever_the_pictures_stand(vicuna: Chat, question: str) -> None:
    turns = [Turn("user", question), Turn("assistant", "Yes."), Turn("user", "And?"), Turn("assistant", "No")]
    ids, labels = vicuna.encode(turns)
    assert ids == llava_ids(vicuna.tokenizer, turns)
    assert [_decoded(vicuna.tokenizer, span) for span in _spans(labels)] == [" Yes.</s>", " No</s>"]


def test_vicuna_splits_at_the_picture_as_llava_does(vicuna: Chat) -> None:
    tokenizer = vicuna.tokenizer
    ids = vicuna.prompt([Turn("user", f"{IMAGE}\nWhat is it?")])
    place = ids.index(IMAGE_ID)
    before, after = ids[:place], ids[place + PLACES :]
    assert before == [tokenizer.bos_token_id, *_sentencepiece(tokenizer, VICUNA_SYSTEM + " USER: ")]
    assert tokenizer.convert_ids_to_tokens(before)[-1] == "\u2581"
    assert after == _sentencepiece(tokenizer, "\nWhat is it? ASSISTANT:")
    assert tokenizer.convert_ids_to_tokens(after)[:2] == ["\u2581", "<0x0A>"]


@given(turns=conversations())
@settings(max_examples=25, deadline=None)
def test_vicuna_labels_and_prompts(vicuna: Chat, turns: list[Turn]) -> None:
    ids, labels = vicuna.encode(turns)
    said = [f" {turn.text}</s>" for turn in turns if turn.role == "assistant"]
    assert [_decoded(vicuna.tokenizer, span) for span in _spans(labels)] == said
    for i, turn in enumerate(turns):
        if turn.role == "user":
            prompt = vicuna.prompt(turns[: i + 1])
            assert prompt == ids[: len(prompt)]
            assert labels[len(prompt)] != IGNORE


def test_vicuna_does_not_let_speech_end_a_turn(vicuna: Chat) -> None:
    ids, _ = vicuna.encode([Turn("user", "a</s>b <s>"), Turn("assistant", "c</s>d")])
    tokenizer = vicuna.tokenizer
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.bos_token_id) == 1


# --- plain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_is_the_picture_and_then_the_answer(make_tokenizer: Any, family: str) -> None:
    chat = Chat(make_tokenizer(family), "plain", PLACES)
    ids, labels = chat.encode([Turn("user", f"Describe it.\n{IMAGE}"), Turn("assistant", "A red circle.")])
    tokenizer = chat.tokenizer
    assert ids[: 1 + PLACES] == [tokenizer.bos_token_id] + [IMAGE_ID] * PLACES
    assert labels == [IGNORE] * (1 + PLACES) + ids[1 + PLACES :]
    assert _decoded(tokenizer, ids[1 + PLACES :]).strip() == "A red circle.</s>"


# --- pictures ------------------------------------------------------------------------------------------


@given(turns=conversations())
@settings(max_examples=10, deadline=None)
def test_each_placeholder_becomes_a_pictures_tokens(
    setting: tuple[str, Chat, Any], turns: list[Turn]
) -> None:
    _, chat, _ = setting
    ids, labels = chat.encode(turns)
    assert ids.count(IMAGE_ID) == PLACES * sum(turn.text.count(IMAGE) for turn in turns)
    assert IMAGE_ID not in labels


# --- errors --------------------------------------------------------------------------------------------

Q, A = Turn("user", "Q"), Turn("assistant", "A")


@pytest.mark.parametrize("format", ["template", "vicuna_v1", "plain"])
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "empty"),
        ([Turn("system", "s")], "empty"),
        ([A], "the user's was expected"),
        ([Q, Q], "the assistant's was expected"),
        ([Q, A, A], "turn 3 is the assistant's"),
        ([Q, Turn("system", "s"), A], "system turn"),
        ([Q, Turn("assistant", f"see {IMAGE}")], "stands in the assistant's turn"),
        ([Turn("system", IMAGE), Q, A], "stands in the system's turn"),
        ([Q], "supervised"),
    ],
)
def test_broken_conversations(make_tokenizer: Any, format: str, turns: list[Turn], message: str) -> None:
    chat = Chat(make_tokenizer("byte_level", "mistral"), format, PLACES)
    with pytest.raises(UserError, match=message):
        chat.encode(turns)


@pytest.mark.parametrize("turns", [[], [Q, A]])
def test_a_prompt_ends_with_the_user(make_tokenizer: Any, turns: list[Turn]) -> None:
    with pytest.raises(UserError, match="end with a user's turn"):
        Chat(make_tokenizer("byte_level", "chatml"), "template", PLACES).prompt(turns)


def test_a_format_the_tokenizer_cannot_serve(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="unknown chat format 'vicuna'"):
        Chat(make_tokenizer("byte_level"), "vicuna", PLACES)
    with pytest.raises(UserError, match="no chat template"):
        Chat(make_tokenizer("byte_level"), "template", PLACES)
    with pytest.raises(UserError, match="BOS"):
        Chat(make_tokenizer("byte_level", bos_token=None), "vicuna_v1", PLACES)
    with pytest.raises(UserError, match="no end token"):
        Chat(make_tokenizer("byte_level", eos_token=None), "plain", PLACES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% if loop.last %}>{% endif %}{{ m['content'] }}</s>{% endfor %}", "prefix"),
        ("{{ messages[0]['content'] }}</s>", "leaves out"),
        (
            "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}</s>"
            "{% endif %}{% endfor %}",
            "leaves out the system's turn",
        ),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for m in messages %}{{ m['content'] | upper }}</s>{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m['content'] | replace('A', 'B') }}</s>{% endfor %}", "changes what"),
        ("{% for m in messages %}{{ m['content'] }}|{{ m['content'] }}</s>{% endfor %}", "changes what"),
    ],
)
def test_templates_that_would_train_something_else(make_tokenizer: Any, template: str, message: str) -> None:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        Chat(tokenizer, "template", PLACES).encode([Turn("system", "s"), Q, A])


def test_a_template_without_an_end_gets_the_end_token(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids, labels = Chat(tokenizer, "template", PLACES).encode([Q, A])
    assert [_decoded(tokenizer, span) for span in _spans(labels)] == [" A</s>"]
    assert tokenizer.decode(ids) == "user: Q\nassistant: A</s>\n"


def test_white_space_that_a_special_token_swallows(make_tokenizer: Any) -> None:
    """Phi-3's end tokens swallow the line break that its template writes after them."""
    from tokenizers import AddedToken

    tokenizer, reference = make_tokenizer("llama_always", "chatml"), make_tokenizer("llama_always", "chatml")
    for each in (tokenizer, reference):
        each.add_special_tokens({"eos_token": AddedToken("<|done|>", rstrip=True, special=True)})
        each.chat_template = each.chat_template.replace("<|im_end|>", "<|done|>")
    turns = [Q, A, Q, A]
    rendered = reference.apply_chat_template(_messages(turns), tokenize=False)
    assert Chat(tokenizer, "template", PLACES).encode(turns)[0] == _whole(reference, rendered)

"""Chat templates as well-known models publish them, rewritten here from what they are documented to render.

Each first gives the very text that stands beside it; then ids, labels and prompts are held to the tokenizer's
own tokenisation of the whole rendered text.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data.chat import IGNORE, IMAGE, IMAGE_ID, VICUNA_SYSTEM, Chat, Turn

PLACES = 3  # tokens of a picture


@dataclass(frozen=True)
class Published:
    """A model's template: of which family its tokenizer is, the tokens that it adds, what it renders of `Be
    brief.`, `Q1`, `A1`, `Q2`, `A2`, and what stands around an answer in the labels.
    """

    family: str
    tokens: tuple[str, ...]
    eos: str
    template: str
    rendered: str
    around: tuple[str, str]
    last: str = ""  # what else ends the last answer
    system: bool = True
    rounds: int = 2


_LOOP = "{% for m in messages %}"
LLAMA_3 = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3.2 asks for today's date where none is given.
LLAMA_32 = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}"
    "{% else %}{% set said = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{ date_string + '\n\n' + said + '<|eot_id|>' }}" + LLAMA_3.removeprefix("{{ bos_token }}")
)
QWEN_25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    + _LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3 writes what was thought only after the last question, also where nothing was.
QWEN_3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _LOOP
    + "{% set said = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{% else %}"
    "{{ said }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}"
    + _LOOP
    + _ALTERNATE
    + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Mistral's third tokenizer has [INST] and [/INST] as tokens; the system speaks in the last question.
MISTRAL_3 = (
    "{% set said = '' %}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + (said if loop.last or loop.index0 == messages | length - 2 else '') }}"
    "{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% set messages = messages[1:] %}"
    "{% else %}{% set said = '"
    + VICUNA_SYSTEM.replace("'", "\\'")
    + "' %}{% endif %}{{ bos_token + said + ' ' }}"
    + _LOOP
    + "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PHI_3 = (
    _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + _LOOP
    + _ALTERNATE
    + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Gemma 3 puts the system's turn into the first question.
GEMMA_3 = (
    "{{ bos_token }}{% set said = '' %}{% if messages[0].role == 'system' %}"
    "{% set said = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + _LOOP
    + _ALTERNATE
    + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (said if loop.first else '') + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLLM_2 = QWEN_25.replace(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
PHI_4 = (
    _LOOP + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


PUBLISHED = {
    "Llama 3": Published(
        "byte_level",
        (),
        "<|eot_id|>",
        LLAMA_3,
        f"<s>{_header('system')}Be brief.<|eot_id|>{_header('user')}Q1"
        f"<|eot_id|>{_header('assistant')}A1<|eot_id|>"
        f"{_header('user')}Q2<|eot_id|>{_header('assistant')}A2<|eot_id|>",
        ("", "<|eot_id|>"),
    ),
    "Llama 3.2": Published(
        "byte_level",
        (),
        "<|eot_id|>",
        LLAMA_32,
        f"<s>{_header('system')}Cutting Knowledge Date: December 2023\n"
        f"Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        f"{_header('user')}Q1<|eot_id|>{_header('assistant')}A1<|eot_id|>"
        f"{_header('user')}Q2<|eot_id|>{_header('assistant')}A2<|eot_id|>",
        ("", "<|eot_id|>"),
    ),
    "Qwen2.5": Published(
        "byte_level",
        (),
        "<|im_end|>",
        QWEN_25,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
        ("", "<|im_end|>"),
    ),
    "Qwen3": Published(
        "byte_level",
        (),
        "<|im_end|>",
        QWEN_3,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>\n",
        ("<think>\n\n</think>\n\n", "<|im_end|>"),
        rounds=1,
    ),
    "Mistral 7B v0.1": Published(
        "llama_always",
        (),
        "</s>",
        MISTRAL_1,
        "<s>[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
        (" ", "</s>"),
        system=False,
    ),
    "Mistral 7B v0.3": Published(
        "llama_first",
        ("[INST]", "[/INST]"),
        "</s>",
        MISTRAL_3,
        "<s>[INST] Q1[/INST] A1</s>[INST] Be brief.\n\nQ2[/INST] A2</s>",
        (" ", "</s>"),
        rounds=1,
    ),
    "Vicuna": Published(
        "llama_first",
        (),
        "</s>",
        VICUNA,
        "<s>Be brief. USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
        (" ", "</s>"),
    ),
    "Phi-3": Published(
        "llama_always",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        PHI_3,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n<|endoftext|>",
        ("", "<|end|>"),
        last="\n<|endoftext|>",
    ),
    "Gemma 2": Published(
        "llama_first",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        GEMMA_2,
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
        ("", "<end_of_turn>"),
        system=False,
    ),
    "Gemma 3": Published(
        "llama_first",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        GEMMA_3,
        "<s><start_of_turn>user\nBe brief.\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
        ("", "<end_of_turn>"),
    ),
    "SmolLM2": Published(
        "byte_level",
        (),
        "<|im_end|>",
        SMOLLM_2,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
        ("", "<|im_end|>"),
    ),
    "Phi-4": Published(
        "byte_level",
        ("<|im_sep|>",),
        "<|im_end|>",
        PHI_4,
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Q1<|im_end|>"
        "<|im_start|>assistant<|im_sep|>A1<|im_end|>"
        "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>A2<|im_end|>",
        ("", "<|im_end|>"),
    ),
}
BRIEF = Turn("system", "Be brief.")
ROUNDS = [Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2")]


def _tokenizer(name: str, make_tokenizer: Any) -> Any:
    model = PUBLISHED[name]
    made = make_tokenizer(model.family)
    made.add_special_tokens({"additional_special_tokens": list(model.tokens), "eos_token": model.eos})
    if name == "Qwen3":
        made.add_tokens(["<think>", "</think>"])  # no special tokens, as there
    made.chat_template = model.template
    return made


@pytest.fixture(scope="module", params=PUBLISHED)
def setting(request: pytest.FixtureRequest, make_tokenizer: Any) -> tuple[str, Chat, Any]:
    """A model's name, a Chat with its template, and a second tokenizer like it, for reference."""
    chat = Chat(_tokenizer(request.param, make_tokenizer), "template", PLACES)
    reference = _tokenizer(request.param, make_tokenizer)
    reference.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    return request.param, chat, reference


def _rendered(tokenizer: Any, turns: list[Turn]) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024"))


def test_the_rewritten_template_renders_what_the_model_expects(setting: tuple[str, Chat, Any]) -> None:
    name, _, reference = setting
    turns = [BRIEF, *ROUNDS] if "Be brief." in PUBLISHED[name].rendered else ROUNDS
    assert _rendered(reference, turns) == PUBLISHED[name].rendered


words = st.sampled_from(
    ["What", "is", "a", "red circle", "12", "né", "你", "\U0001f408", "</s>", "[INST]", "?", "\n", "  "]
)
questions = st.lists(words, max_size=5).map(" ".join) | st.lists(words, max_size=5).map("".join)
answers = questions.map(str.strip).filter(bool)


@given(
    said=st.lists(st.tuples(questions, answers), min_size=1, max_size=2),
    system=st.none() | answers,
    data=st.data(),
)
def test_ids_labels_and_prompts(
    setting: tuple[str, Chat, Any],
    said: list[tuple[str, str]],
    system: str | None,
    data: st.DataObject,
) -> None:
    name, chat, reference = setting
    model = PUBLISHED[name]
    turns = [Turn("system", system)] if system and model.system else []
    for question, answer in said[: model.rounds]:
        place = data.draw(st.integers(0, len(question)))
        shown = question[:place] + IMAGE + question[place:]
        turns += [Turn("user", shown), Turn("assistant", answer)]
    ids, labels = chat.encode(turns)

    alike = [Turn(t.role, _as_text(t.text)) for t in turns]
    ids_alike, labels_alike = chat.encode(alike)
    whole = reference(_rendered(reference, alike), add_special_tokens=False).input_ids
    picture = reference.convert_tokens_to_ids(IMAGE)
    assert ids_alike == [i for t in whole for i in ([IMAGE_ID] * PLACES if t == picture else [t])]

    before, after = model.around
    spans = [_decoded(chat.tokenizer, span) for span in _spans(labels_alike)]
    expected = [before + t.text + after for t in alike if t.role == "assistant"]
    expected[-1] += model.last
    assert [span.replace(" ", "") for span in spans] == [text.replace(" ", "") for text in expected]

    special = {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in ids if i in special] == [i for i in ids_alike if i in special]
    for i, turn in enumerate(turns):
        if turn.role == "user":
            prompt = chat.prompt(turns[: i + 1])
            assert prompt == ids[: len(prompt)]
            assert labels[len(prompt)] != IGNORE


def _as_text(text: str) -> str:
    """Without what the whole text's tokenisation would take for a special token."""
    return text.replace("</s>", "s").replace("[INST]", "i")


def _spans(labels: list[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for before, label in pairwise([IGNORE, *labels]):
        if label != IGNORE:
            if before == IGNORE:
                spans.append([])
            spans[-1].append(label)
    return spans


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    line = tokenizer("\n", add_special_tokens=False).input_ids
    return str(tokenizer.decode(line + ids)).removeprefix("\n")


# ---- What does not work is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("Qwen3", ROUNDS, "writes a turn differently once more turns follow"),
        (
            "Qwen3",
            [ROUNDS[0], Turn("assistant", "<think>\nHm.\n</think>\n\nA1")],
            "changes what this conversation",
        ),
        ("Mistral 7B v0.1", [BRIEF, *ROUNDS], "refuses this conversation: Roles must alternate"),
        ("Mistral 7B v0.3", [BRIEF, *ROUNDS], "puts the system's turn elsewhere once more turns follow"),
        ("Gemma 2", [BRIEF, *ROUNDS], "refuses this conversation: System role not supported"),
    ],
)
def test_what_a_template_cannot_do_is_told(
    make_tokenizer: Any, name: str, turns: list[Turn], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Chat(_tokenizer(name, make_tokenizer), "template", PLACES).encode(turns)


def test_the_day_of_the_run_changes_no_prompt(make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(_tokenizer("Llama 3.2", make_tokenizer), "template", PLACES)
    today = f"{datetime.now():%d %b %Y}"
    assert today in chat.tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert today not in chat.tokenizer.decode(chat.encode(ROUNDS)[0])
    assert "Today Date: 26 Jul 2024" in chat.tokenizer.decode(chat.prompt(ROUNDS[:1]))


def test_vicuna_by_its_template_is_vicuna_v1(make_tokenizer: Any) -> None:
    tokenizer = _tokenizer("Vicuna", make_tokenizer)
    by_template = Chat(tokenizer, "template", PLACES).encode(ROUNDS)
    ids, labels = Chat(tokenizer, "vicuna_v1", PLACES).encode(ROUNDS)
    assert by_template[0][-40:] == ids[-40:] and by_template[1][-40:] == labels[-40:]

"""Chat templates of processors, in which a message is a list of texts and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_text
from mmtune.data.chat import IMAGE, VICUNA_SYSTEM

# Put before a template that takes lists, so that it takes texts too, and the other way round.
TAKES_TEXT = (
    "{%- set taken = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set taken.messages = taken.messages + "
    "[{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}] -%}"
    "{%- else -%}{%- set taken.messages = taken.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = taken.messages -%}"
)
TAKES_LISTS = (
    "{%- set taken = namespace(messages=[], text='') -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set taken.text = message['content'] -%}{%- else -%}"
    "{%- set taken.text = '' -%}{%- for part in message['content'] -%}"
    "{%- set taken.text = taken.text + ('" + IMAGE + "\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set taken.messages = taken.messages + [{'role': message['role'], 'content': taken.text}] -%}"
    "{%- endfor -%}{%- set messages = taken.messages -%}"
)
_VICUNA = TAKES_LISTS + (
    "{%- set said = namespace(system='" + VICUNA_SYSTEM.replace("'", "\\'") + "') -%}"
    "{%- for message in messages if message['role'] == 'system' -%}"
    "{%- set said.system = message['content'] -%}{%- endfor -%}"
    "{{- bos_token + 'APART' + said.system + ' ' -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' + message['content'] | replace('<image>', '<image>APART') + ' ASSISTANT:' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- (' ' + message['content'] if message['content'] else '') + eos_token -}}"
    "{%- endif -%}{%- endfor -%}"
)


def vicuna(spaces: bool) -> str:
    """A template that renders `vicuna_v1`. spaces: writes one where LLaVA has SentencePiece's dummy space,
    after BOS and after each picture, for a tokenizer that puts none there.
    """
    return _VICUNA.replace("APART", " " if spaces else "")


def template_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a processor's folder; transformers has kept it in several files."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file() and (found := read_json(folder / name).get("chat_template")):
            return str(found)
    return str(tokenizer.chat_template) if tokenizer.chat_template else None


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], asks: bool = True
) -> str | None:
    """A conversation as a template writes it; None where the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=asks
            )
        )
    except (jinja2.TemplateError, TypeError):
        return None


def chat_format(tokenizer: PreTrainedTokenizerBase, template: str | None, where: Path) -> tuple[str, str]:
    """The chat format whose prompts a template writes, and a note on what was found: vicuna_v1 where it asks
    as `USER: ... ASSISTANT:` with Vicuna's system line or none, otherwise `template`. Raises UserError where
    there is none.
    """
    if template is None:
        raise UserError(
            "it holds no chat template, so how the model is asked is not known",
            where=where,
            mend="Say it: --chat vicuna_v1 for LLaVA-1.5 on Vicuna.",
        )
    question = "What is shown here?"
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    asked = render(tokenizer, template, [{"role": "user", "content": parts}])
    if asked is None or question not in asked:
        asked = render(tokenizer, template, [{"role": "user", "content": f"{IMAGE}\n{question}"}])
    if asked is None or question not in asked:
        raise UserError(
            "its chat template leaves out what the user says",
            where=where,
            mend="Name the chat format: --chat vicuna_v1 for LLaVA-1.5 on Vicuna.",
        )
    asked = asked.replace(f"{IMAGE} \n", f"{IMAGE}\n")  # as `vicuna` writes it where the tokenizer does not
    before, turn, after = asked.partition(f"USER: {IMAGE}\n{question} ASSISTANT:")
    system = before.strip().removeprefix(str(tokenizer.bos_token or "")).strip()
    if not turn or after.strip() or system not in ("", VICUNA_SYSTEM):
        return "template", "chat: template, the one in its files"
    if system:
        return "vicuna_v1", "chat: vicuna_v1, as its template has it"
    return (
        "vicuna_v1",
        "chat: vicuna_v1. Its template asks as USER: ... ASSISTANT: but has no system line; LLaVA-1.5 was "
        "trained and evaluated with one, so prompts here begin with it.",
    )


def taking_lists(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template, made to take a message that is a list of pictures and texts where it took texts alone."""
    parts = [{"type": "image"}, {"type": "text", "text": "What is shown here?"}]
    as_text = render(tokenizer, template, [{"role": "user", "content": f"{IMAGE}\nWhat is shown here?"}])
    as_list = render(tokenizer, template, [{"role": "user", "content": parts}])
    return template if as_list == as_text else TAKES_LISTS + template


def taking_text(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template, made to take a message that is a text where it took lists alone."""
    said = render(tokenizer, template, [{"role": "user", "content": "What is shown here?"}])
    return template if said and "What is shown here?" in said else TAKES_TEXT + template

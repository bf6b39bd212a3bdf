"""Turns -> token ids and labels, built together turn by turn.

A conversation becomes a list of pieces (text, supervised or not). Neighbours are tokenised together,
as they would be within the whole text, but never across the border of what the assistant said, so a
label can only ever cover that and the token that ends its turn, and a prompt is always a prefix of its
conversation. Text of users and assistants never becomes a special token; `<image>` becomes
`image_tokens` copies of IMAGE_ID, which the model replaces by the picture's features.

Formats: `template` is the tokenizer's own chat template; `vicuna_v1` gives the ids of LLaVA-1.5's
tokenisation; `plain` is LLaVA's alignment format, the picture and then the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Literal

from mmtune.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
IMAGE_ID = -200
IGNORE = -100
_PICTURE = re.compile(f"({IMAGE})")

FORMATS = ("template", "vicuna_v1", "plain")
# Some templates write today's date. Here it is always this day, as Llama 3.1 has it where none is given, so
# that a model is asked as it was trained, whenever that is.
_DAY = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_OTHER = "Name another chat format under model.language.chat, for example vicuna_v1."
# Whose texts a chat template may trim: nobody's, or those of some roles.
_TRIMMED = [some for count in range(4) for some in combinations(("system", "user", "assistant"), count)]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Turn:
    """What one side said. `<image>` in a user's text stands where a picture belongs."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation. `control`: written by the format, so special tokens in it are real."""

    text: str
    supervised: bool = False
    control: bool = False


class Chat:
    """A tokenizer together with one of the FORMATS and the number of tokens a picture takes.

    context: the most tokens that the language model takes.

    Raises UserError for a format the tokenizer cannot serve.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: str,
        image_tokens: int,
        context: float = math.inf,
    ) -> None:
        if format not in FORMATS:
            raise UserError(f"unknown chat format '{format}'", mend=f"Known: {', '.join(FORMATS)}.")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end token, so an answer could never end",
                where=tokenizer.name_or_path,
                mend="Set eos_token in its tokenizer_config.json.",
            )
        if format == "template" and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where=tokenizer.name_or_path,
                mend=_OTHER,
            )
        if format == "vicuna_v1" and tokenizer.bos_token_id is None:
            raise UserError(
                "chat format vicuna_v1 starts with a BOS token, and the tokenizer has none",
                where=tokenizer.name_or_path,
                mend="Name another chat format under model.language.chat, for example template.",
            )
        self.tokenizer = tokenizer
        self._written = _of_one_day(str(tokenizer.get_chat_template())) if format == "template" else None
        self.format = format
        self.image_tokens = image_tokens
        self.context = context
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = {token.content: i for i, token in special.items()}
        self._unsayable = special.keys() - {tokenizer.unk_token_id}
        self._swallowing = {i for i, token in special.items() if token.rstrip}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # SentencePiece models put a dummy space before a text. Some conversions of them also do so after
        # each special token, others only where the text begins.
        self.dummy_space = tokenizer.tokenize("x")[0].startswith("\u2581")
        after_special = tokenizer(tokenizer.eos_token + "x", add_special_tokens=False).input_ids[1:]
        self.dummy_after_special = after_special == self._raw("x")

    def in_format(self, format: str | None) -> Chat:
        """The same tokenizer and pictures in another of the FORMATS, or this one for None.

        Raises UserError for a format the tokenizer cannot serve.
        """
        if format in (None, self.format):
            return self
        return Chat(self.tokenizer, format, self.image_tokens, self.context)

    def encode(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation, and labels: the id where the assistant speaks, else IGNORE.

        Raises UserError where nothing is supervised.
        """
        ids, labels = self._tokenise(self._pieces(turns))
        if all(label == IGNORE for label in labels):
            raise UserError(
                "no token of this conversation is supervised", mend="It needs an assistant's turn."
            )
        return ids, labels

    def prompt(self, turns: list[Turn]) -> list[int]:
        """Ids up to where the assistant's next turn begins; `turns` ends with the user's."""
        if not turns or turns[-1].role != "user":
            raise UserError("a prompt must end with a user's turn")
        return self._tokenise(self._pieces(turns), answer_follows=True)[0]

    def _pieces(self, turns: list[Turn]) -> list[Piece]:
        check_roles(turns)
        if self.format == "vicuna_v1":
            return self._vicuna(turns)
        if self.format == "plain":
            return self._plain(turns)
        return self._template(turns)

    def _vicuna(self, turns: list[Turn]) -> list[Piece]:
        system = turns[0].text if turns[0].role == "system" else VICUNA_SYSTEM
        pieces = [Piece(self.tokenizer.bos_token, control=True)]
        before = system + " "
        for turn in turns:
            if turn.role == "user":
                pieces.append(Piece(f"{before}USER: {turn.text} ASSISTANT:"))
                before = ""
            elif turn.role == "assistant":
                pieces.append(Piece(f" {turn.text}" if turn.text else "", supervised=True))
                pieces.append(Piece(self.tokenizer.eos_token, supervised=True, control=True))
        return pieces

    def _plain(self, turns: list[Turn]) -> list[Piece]:
        pieces = [Piece(self.tokenizer.bos_token, control=True)] if self.tokenizer.bos_token else []
        for turn in turns:
            if turn.role == "user":
                pieces.append(Piece(IMAGE * turn.text.count(IMAGE)))
            elif turn.role == "assistant":
                pieces.append(Piece(turn.text, supervised=True))
                pieces.append(Piece(self.tokenizer.eos_token, supervised=True, control=True))
        return pieces

    def _template(self, turns: list[Turn]) -> list[Piece]:
        """Renders with a mark in place of each turn's text, so that the format and the speech stay apart.

        The prompt of each answer must be a prefix of the conversation that holds the answer, otherwise
        the model would be asked another question than it was trained on.
        """
        marks = [f"[[turn-{i}]]" for i in range(len(turns))]
        messages = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
        asks = turns[-1].role == "user"
        whole = self._render(messages, generation=asks)
        missing = [turn.role for turn, mark in zip(turns, marks, strict=True) if mark not in whole]
        if missing:
            raise UserError(f"the tokenizer's chat template leaves out the {missing[0]}'s turn", mend=_OTHER)
        places = [whole.index(mark) for mark in marks]
        if moved := [
            turn.role for turn, (one, other) in zip(turns[:-1], pairwise(places), strict=True) if one > other
        ]:
            raise UserError(
                f"the tokenizer's chat template puts the {moved[0]}'s turn elsewhere once more turns follow, "
                "so a trained answer would not match its prompt",
                mend=_OTHER,
            )
        turns = self._as_written(turns, whole, marks)
        pieces: list[Piece] = []
        done = 0

        def advance(text: str, supervised: bool = False) -> None:
            nonlocal done
            if whole[done : done + len(text)] != text:
                raise UserError(
                    "the tokenizer's chat template writes a turn differently once more turns follow, "
                    "so a trained answer would not match its prompt",
                    mend="Use a template with the prefix property, or another chat format.",
                )
            done += len(text)
            pieces.extend(_split_at_marks(text, marks, turns, supervised))

        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(messages[:i], generation=True)
            advance(prompt[done:])
            until = self._render(messages[: i + 1], generation=False)
            if not whole.startswith(until):  # Phi-3 ends each text once more, after the last turn's own end
                until = until.removesuffix(self.tokenizer.eos_token)
            answer, mark, ending = until[done:].partition(marks[i])
            if not mark:
                raise UserError("the tokenizer's chat template leaves out the assistant's turn", mend=_OTHER)
            kept = ending.rstrip()
            advance(answer + mark + kept, supervised=True)
            if not kept:
                pieces.append(Piece(self.tokenizer.eos_token, supervised=True, control=True))
            advance(ending[len(kept) :])
        advance(whole[done:])
        return pieces

    def _as_written(self, turns: list[Turn], whole: str, marks: list[str]) -> list[Turn]:
        """The turns as the template writes their texts in the places of the marks in `whole`.

        Templates may trim: Llama 3's and Gemma's what anyone says, Mistral's what the assistant says.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        real = self._render(messages, generation=turns[-1].role == "user")
        for trimmed in _TRIMMED:
            said = [replace(turn, text=turn.text.strip()) if turn.role in trimmed else turn for turn in turns]
            if "".join(piece.text for piece in _split_at_marks(whole, marks, said, False)) == real:
                return said
        raise UserError(
            "the tokenizer's chat template changes what this conversation says",
            mend=_OTHER,
        )

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self._written, tokenize=False, add_generation_prompt=generation
                )
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses this conversation: {error}", mend=_OTHER
            ) from None

    def _tokenise(self, pieces: list[Piece], answer_follows: bool = False) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []

        def add(new: list[int], supervised: bool) -> None:
            ids.extend(new)
            labels.extend(new if supervised else [IGNORE] * len(new))

        text, text_supervised, start = "", False, "text"
        for atom, supervised in self._atoms(pieces):
            if isinstance(atom, int):
                add(self._ids(text, start), text_supervised)
                add([atom] * (self.image_tokens if atom == IMAGE_ID else 1), supervised)
                text, start = "", self._after(atom)
                continue
            if not atom:
                continue
            if text and supervised != text_supervised:
                # A word is tokenised together with the space before it, also across the border.
                kept = text if text_supervised else text.rstrip(" ")
                add(self._ids(kept, start), text_supervised)
                text = text[len(kept) :]
                start = "middle" if kept else start
            text, text_supervised = text + atom, supervised
        add(self._ids(text.rstrip(" ") if answer_follows else text, start), text_supervised)
        return ids, labels

    def _atoms(self, pieces: list[Piece]) -> Iterator[tuple[str | int, bool]]:
        """Stretches of text and, between them, special tokens and pictures as ids; each supervised or not."""
        swallowed = False  # Phi-3's special tokens swallow the white space after them.
        for piece in pieces:
            for i, part in enumerate((self._special if piece.control else _PICTURE).split(piece.text)):
                if i % 2 == 0:
                    yield part.lstrip() if swallowed else part, piece.supervised
                    swallowed = swallowed and not part.strip()
                elif piece.control:
                    yield self._special_ids[part], piece.supervised
                    swallowed = self._special_ids[part] in self._swallowing
                else:
                    yield IMAGE_ID, False
                    swallowed = False

    def _after(self, atom: int) -> str:
        """LLaVA gives its tokenizer the text between pictures `chunk` by chunk, BOS before the first.

        Within a chunk the end token is a special token as in any text.
        """
        apart = atom == IMAGE_ID or atom == self.tokenizer.bos_token_id
        return "chunk" if apart and self.format != "template" else "special"

    def _ids(self, text: str, start: str) -> list[int]:
        """Ids of a stretch that stands where the whole text starts (`text`), or a chunk of LLaVA's (`chunk`),
        after a special token or a picture (`special`), or right behind other text (`middle`).
        """
        if not text:
            return []
        if not self.dummy_space:
            return self._raw(text)
        if start == "chunk":  # the dummy space also comes before a space, unlike in some conversions
            return self._continued(" " + text)
        if start == "middle" or (start == "special" and not self.dummy_after_special):
            return self._continued(text)
        return self._raw(text)

    def _continued(self, text: str) -> list[int]:
        """Ids of `text` as they are in the middle of a longer text, without a dummy space."""
        for before in ("\n", "!"):
            head, whole = self._raw(before), self._raw(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        raise UserError(f"the tokenizer cannot go on in the middle of a text, with {text[:20]!r}")

    def _raw(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if not self._unsayable.intersection(ids):
            return ids
        # Unigram and word-level models hold their special tokens as words too: cut in two, they stay text.
        found = self._special.search(text)
        if found is None or len(found[0]) < 2:
            raise UserError(f"the tokenizer reads a special token in what is said: {text[:40]!r}")
        cut = found.start() + 1
        return self._raw(text[:cut]) + (self._continued if self.dummy_space else self._raw)(text[cut:])


def _of_one_day(template: str) -> str:
    """A chat template that writes the same date every day. Raises UserError where it cannot be made one."""
    fixed = _TODAY.sub(lambda asked: repr(_DAY.strftime(asked[2])), template)
    if "strftime_now(" in fixed:
        raise UserError("the tokenizer's chat template writes another date every day", mend=_OTHER)
    return fixed


def _split_at_marks(text: str, marks: list[str], turns: list[Turn], supervised: bool) -> list[Piece]:
    pieces = []
    for mark, turn in zip(marks, turns, strict=True):
        before, found, after = text.partition(mark)
        if not found:
            continue
        if before:
            pieces.append(Piece(before, supervised, control=True))
        pieces.append(Piece(turn.text, supervised))
        text = after
    if text:
        pieces.append(Piece(text, supervised, control=True))
    return pieces


def check_roles(turns: Sequence[Turn]) -> None:
    """Raises UserError for turns that do not alternate, the user's first, or pictures in others' turns."""
    speakers = [turn.role for turn in turns if turn.role != "system"]
    if not speakers:
        raise UserError("the conversation is empty", mend="It needs a user's turn and the assistant's.")
    if any(turn.role == "system" for turn in turns[1:]):
        raise UserError("a system turn stands after another turn", mend="It must be the first.")
    for i, role in enumerate(speakers):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise UserError(
                f"turn {i + 1} is the {role}'s, the {expected}'s was expected", mend="Turns must alternate."
            )
    for turn in turns:
        if turn.role != "user" and IMAGE in turn.text:
            raise UserError(
                f"{IMAGE} stands in the {turn.role}'s turn; pictures belong to the user's",
                mend="Move it to the user's turn, or spell it in another way where no picture is meant.",
            )

"""Training data at fault: files, rows, conversations, texts, paths."""

from __future__ import annotations

import json
import os

from mmtune.data.chat import IMAGE_ID
from mmtune.data.image import is_there
from tests.bad_input.bench import Bench, Kind, sample, turns

TINY = 9  # tokens: fewer than a picture has
SPECIAL = "</s> <|end|> <|user|> <|assistant|> <|image|> <s> <pad> <unk>"


def _ids(bench: Bench) -> tuple[list[int], list[int]]:
    return bench.language.chat.encode(list(bench.sample.turns))


def _nothing_special(bench: Bench) -> bool:
    """Special tokens that a user writes are letters: with and without them the same special ids."""
    chat, tokens = bench.language.chat, bench.language.language.tokenizer
    special = set(tokens.all_special_ids)
    written = " ".join([SPECIAL, *tokens.all_special_tokens])
    counts = []
    for text in (written, "letters"):
        ids, _ = chat.encode(
            [turn if turn.role != "user" else type(turn)("user", text) for turn in bench.sample.turns]
        )
        counts.append([i for i in ids if i in special])
    return counts[0] == counts[1] and written.strip("<") in tokens.decode(_ids(bench)[0])


def _special(bench: Bench) -> list[object]:
    written = " ".join([SPECIAL, *bench.language.language.tokenizer.all_special_tokens])
    return bench.data(sample(ask=written, image=...), train={"max_length": 512})


def _linked(bench: Bench) -> list[object]:
    bench.picture("elsewhere/b.png")
    (bench.here / "pictures").symlink_to(bench.here / "elsewhere")
    return bench.data(sample(image="pictures/b.png"))


def _linked_up(bench: Bench) -> list[object]:
    bench.picture("deep/down/b.png")
    (bench.here / "link").symlink_to(bench.here / "deep" / "down")
    return bench.data(sample(image="link/../../b.png"))


def _closed(bench: Bench) -> list[object]:
    command = bench.data(sample())
    os.chmod(bench.here / "data.json", 0)
    return command


def _skipping(bench: Bench, *rows: object, most: int) -> list[object]:
    return bench.data(*rows, train={"max_length": most, "too_long": "skip"})


def _text(row: object) -> str:
    return json.dumps(row)


GOOD = sample()
LONG = sample("Say it.", "word " * 200_000, image=..., id="long")
EMOJI = "\U0001f600"

KINDS = [
    # ---- The file
    Kind(
        "no data file",
        lambda b: b.train(data=[{"path": "no.json"}]),
        "there is no file",
        "data.0.path",
        "path right",
    ),
    Kind(
        "a folder for a data file",
        lambda b: b.train(data=[{"path": str(b.here)}]),
        "there is no file",
        "data.0.path",
        "path right",
    ),
    Kind("an empty data file", lambda b: b.written(""), "the file is empty", "data.json", "written whole?"),
    Kind("a data file nobody may read", _closed, "Permission denied", "data.json", "Look at its permissions"),
    Kind(
        "an empty list of samples", lambda b: b.data(), "there are no samples", "data.json", "written whole?"
    ),
    Kind(
        "broken JSON",
        lambda b: b.written('[\n{"id": "s1"},\n{"id" "s2"}\n]'),
        "Expecting ':'",
        "data.json, line 3",
        "Mend that line",
    ),
    Kind(
        "JSON cut short",
        lambda b: b.written(_text([GOOD, GOOD])[:-40]),
        "not valid JSON",
        "data.json, line 1",
        "written whole?",
    ),
    Kind(
        "broken JSONL",
        lambda b: b.written(_text(GOOD) + "\n{\n", "data.jsonl"),
        "not valid JSON",
        "data.jsonl, line 2",
        "one whole JSON object",
    ),
    Kind(
        "one object for a list",
        lambda b: b.written(_text(GOOD)),
        "expected a list of samples",
        "data.json",
        "between [ and ]",
    ),
    Kind(
        "JSONL named .json",
        lambda b: b.written(_text(GOOD) + "\n" + _text(GOOD)),
        "Extra data",
        "line 2",
        ".jsonl",
    ),
    Kind(
        "a list named .jsonl",
        lambda b: b.written(_text([GOOD]), "data.jsonl"),
        "found list",
        "data.jsonl, line 1",
        "ends in .json",
    ),
    Kind(
        "Latin-1 data",
        lambda b: b.written('[\n"caf\u00e9"]'.encode("latin1")),
        "not a UTF-8",
        "data.json, line 2",
        "iconv",
    ),
    Kind(
        "UTF-16 data",
        lambda b: b.written(_text([GOOD]).encode("utf-16")),
        "not a UTF-8",
        "data.json, line 1",
        "Save it as UTF-8",
    ),
    Kind(
        "a NUL byte in JSON",
        lambda b: b.written('[{"id": "s\0"}]'),
        "Invalid control character",
        "line 1",
        "Mend that line",
    ),
    Kind(
        "a key twice in a sample",
        lambda b: b.written('[{"id": "s1", "image": "a.png", "image": "b.png"}]'),
        "'image' of the object with id s1",
        "data.json",
        "keep one",
    ),
    Kind(
        "half an emoji",
        lambda b: b.written(_text([sample(answer=EMOJI)]).replace("\\ude00", "")),
        "\\ud83d is half of a character",
        "data.json",
        "write both halves",
    ),
    Kind(
        "a whole emoji",
        lambda b: b.data(sample(answer=EMOJI)),
        then=lambda b: b.sample.turns[1].text == EMOJI,
    ),
    Kind(
        "brackets nested too deep",
        lambda b: b.written("[" * 100_000),
        "not valid JSON",
        "data.json",
        "write it anew",
    ),
    Kind(
        "a BOM and Windows line ends in JSONL",
        lambda b: b.written("\ufeff" + _text(GOOD) + "\r\n\r\n" + _text(GOOD) + "\r\n", "data.jsonl"),
        then=lambda b: b.sample.turns[1].text == "two",
    ),
    Kind("a limit of 0", lambda b: b.train("data.0.limit=0"), "found 0", "data.0.limit", "1 or more"),
    # ---- The row
    Kind(
        "a row that is no object",
        lambda b: b.data(GOOD, "x"),
        "found str",
        "data.json, sample 1",
        "A sample is",
    ),
    Kind("ids that are numbers", lambda b: b.data(sample(id=7)), then=lambda b: b.sample.id == "7"),
    Kind("no id", lambda b: b.data(sample(id=...)), "'id' must be", "sample 0", "found nothing"),
    Kind(
        "a list for an id",
        lambda b: b.data(sample(id=[1])),
        "'id' must be",
        "sample 0",
        "text or a whole number",
    ),
    Kind(
        "one id twice",
        lambda b: b.data(GOOD, GOOD),
        then=lambda b: "several samples share an id: s1" in b.said.err,
    ),
    Kind(
        "null for a picture",
        lambda b: b.data(sample("What?", image=None)),
        then=lambda b: b.sample.images == (),
    ),
    Kind(
        "a list of pictures",
        lambda b: b.data(sample("<image> or <image>?", image=["a.png", "a.png"])),
        then=lambda b: len(b.sample.images) == 2,
    ),
    Kind(
        "a number for a picture",
        lambda b: b.data(sample(image=3)),
        "found 3",
        "(id s1)",
        "Leave it out, or null",
    ),
    Kind(
        "'images' for 'image'",
        lambda b: b.data(sample("What?", image=..., images=["a.png"])),
        "'images' is not read",
        "(id s1)",
        "Name it 'image'",
    ),
    Kind(
        "a placeholder without a picture",
        lambda b: b.data(sample(image=...)),
        "but 0 pictures",
        "(id s1)",
        "its own <image>",
    ),
    Kind(
        "a picture without a placeholder",
        lambda b: b.data(sample("What?")),
        "0 <image>",
        "(id s1)",
        "its own <image>",
    ),
    Kind(
        "more placeholders than pictures",
        lambda b: b.data(sample("<image><image>")),
        "2 <image> in",
        "(id s1)",
        "its own <image>",
    ),
    # ---- The conversation
    Kind(
        "no conversation",
        lambda b: b.data(sample(conversations=...)),
        "found nothing",
        "(id s1)",
        "The sample has: id, image",
    ),
    Kind(
        "an empty conversation",
        lambda b: b.data(sample(conversations=[])),
        "found []",
        "(id s1)",
        "at least one turn",
    ),
    Kind(
        "turns as OpenAI writes them",
        lambda b: b.data(sample(conversations=[{"role": "user", "content": "Hi"}])),
        "turn 1 must be",
        "(id s1)",
        "{'from': 'human'",
    ),
    Kind(
        "an unknown role",
        lambda b: b.data(turns(("human", "Hi"), ("bot", "Ho"))),
        "unknown speaker 'bot'",
        "(id s1)",
        "Known: human",
    ),
    Kind(
        "two turns of one role",
        lambda b: b.data(turns(("human", "Hi"), ("human", "You?"), ("gpt", "Ho"))),
        "turn 2 is the user's",
        "sample 0 (id s1)",
        "must alternate",
    ),
    Kind(
        "an answer first",
        lambda b: b.data(turns(("gpt", "Ho"), ("human", "Hi"))),
        "turn 1 is the assistant's",
        "(id s1)",
        "must alternate",
    ),
    Kind(
        "a system turn in the middle",
        lambda b: b.data(turns(("human", "Hi"), ("system", "Be brief."), ("gpt", "Ho"))),
        "a system turn",
        "(id s1)",
        "It must be the first",
    ),
    Kind(
        "nothing that is supervised",
        lambda b: b.data(turns(("human", "Hi"))),
        "nothing to learn",
        "(id s1)",
        "Give it an answer",
    ),
    Kind(
        "an empty answer",
        lambda b: b.data(sample(answer="")),
        "nothing to learn",
        "(id s1)",
        "Give it an answer",
    ),
    Kind(
        "an answer of spaces",
        lambda b: b.data(sample(answer=" \n ")),
        "nothing to learn",
        "(id s1)",
        "Give it an answer",
    ),
    Kind(
        "<image> in an answer",
        lambda b: b.data(sample("What?", "<image>")),
        "the assistant's turn",
        "(id s1)",
        "Move it to the user's",
    ),
    # ---- Text
    Kind("special tokens in a user's text", _special, then=_nothing_special),
    Kind(
        "a NUL byte in a text",
        lambda b: b.data(sample(answer="a\0b")),
        then=lambda b: b.sample.turns[1].text == "a\0b",
    ),
    Kind(
        "a text of a million characters",
        lambda b: b.data(LONG),
        "tokens, more than max_length 512",
        "(id long)",
        "train.max_length",
    ),
    Kind(
        "a million letters without a space",
        lambda b: b.data(sample("Say it.", "a" * 10**6, image=...)),
        "more than max_length",
        "(id s1)",
        "set train.too_long",
    ),
    Kind(
        "a million spaces",
        lambda b: b.data(sample("Say" + " " * 10**6, image=...)),
        "more than max_length",
        "(id s1)",
        "set train.too_long",
    ),
    Kind(
        "a sample too long, to be skipped",
        lambda b: _skipping(b, LONG, GOOD, most=64),
        then=lambda b: "1 of 2 samples skipped as too long: long" in b.said.err,
    ),
    Kind(
        "only samples too long, to be skipped",
        lambda b: _skipping(b, LONG, most=64),
        "every sample is longer",
        "data",
        "Raise train.max_length",
    ),
    Kind(
        "a picture longer than max_length is not cut",
        lambda b: b.data(GOOD, train={"max_length": TINY}),
        f"more than max_length {TINY}",
        "(id s1)",
        "Raise train.max_length",
    ),
    Kind(
        "a sample longer than the context",
        lambda b: b.data(LONG, train={"max_length": 10**9}),
        "context of 512 tokens",
        "(id long)",
        "Shorten it",
    ),
    Kind(
        "a picture among much text is whole",
        lambda b: b.data(sample("word " * 20 + "<image>")),
        then=lambda b: _ids(b)[0].count(IMAGE_ID) == b.language.image_tokens,
    ),
    # ---- Paths of pictures
    Kind(
        "a picture that is not there",
        lambda b: b.data(sample(image="no.png")),
        "no.png",
        "sample s1",
        "image_root right",
    ),
    Kind(
        "a path out of image_root",
        lambda b: b.data(sample(image="../a.png")),
        "'../a.png' leads out",
        "(id s1)",
        "image_root; /",
    ),
    Kind(
        "an absolute path elsewhere",
        lambda b: b.data(sample(image="/etc/hostname")),
        "'/etc/hostname' leads out",
        "(id s1)",
        "image_root; /",
    ),
    Kind("a path out through a link", _linked_up, "'link/../../b.png' leads out", "(id s1)", "image_root; /"),
    Kind(
        "an absolute path inside",
        lambda b: b.data(sample(image=str(b.here / "a.png"))),
        then=lambda b: is_there(b.sample.images[0]),
    ),
    Kind(
        "a linked folder inside image_root",
        _linked,
        then=lambda b: b.sample.images == (b.here / "pictures" / "b.png",),
    ),
    Kind(
        "a NUL byte in a file's name",
        lambda b: b.data(sample(image="a\0.png")),
        "NUL byte",
        "(id s1)",
        "Correct the path",
    ),
    Kind(
        "a name of 5000 characters",
        lambda b: b.data(sample(image="x" * 5000)),
        "no such picture",
        "sample s1",
        "image_root right",
    ),
    Kind(
        "accents and spaces in a file's name",
        lambda b: (b.picture("m\u00eame l\u00e0.png"), b.data(sample(image="m\u00eame l\u00e0.png")))[1],
        then=lambda b: is_there(b.sample.images[0]),
    ),
]

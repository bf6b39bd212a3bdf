"""vicuna_v1 on a SentencePiece tokenizer trained here as Llama's was, in the forms real checkpoints come in.

The vectors are written out by hand from LLaVA's rules (conversation.py, mm_utils.py and train.py of
haotian-liu/LLaVA at c121f04, with the transformers 4.37.2 that it asks for): the conversation is one text,
"SYSTEM USER: question ASSISTANT: answer</s>USER: ...", cut at `<image>`; each chunk is tokenised by itself,
and BOS kept once; supervised is what follows "ASSISTANT:", with its space, up to and with "</s>".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from mmtune.data.chat import IGNORE, IMAGE, IMAGE_ID, VICUNA_SYSTEM, Chat, Turn

# As in Llama's vocabulary, "USER" is one piece within a word, but with its space it is "▁US", "ER".
CORPUS = [
    *[VICUNA_SYSTEM] * 10,
    *["US US US US US US US"] * 20,
    *["SUPERUSER ENDUSER HYPERUSER CORNER FIBER HIGHER OFFER"] * 10,
    *["ASSIST ASSIST ASSIST ANT PLANT ANT GIANT HYDRANT"] * 20,
    *["What is it: A red circle. And there? No. Yes. Is it red? What?"] * 10,
    *["SomeWhat NowWhat SoWhat AhYes OhYes"] * 10,
]
FORMS = ("legacy", "not legacy", "tokenizer.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model, trained with the settings that Llama's names."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def _folder(form: str, trained: Path, folder: Path) -> Path:
    """A tokenizer as LLaVA-1.5 ships it, its model alone, or as transformers 4 converted it for llava-hf."""
    shutil.copy(trained, folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        **tokens,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": form == "legacy",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if form != "tokenizer.json":
        return folder
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": "<pad>"})
    made.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = None
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    stored["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


@pytest.fixture(scope="module", params=FORMS)
def chat(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = _folder(request.param, trained, tmp_path_factory.mktemp("tokenizer"))
    return Chat(AutoTokenizer.from_pretrained(folder), "vicuna_v1", 2)


# ---- By hand --------------------------------------------------------------------------------------------

# Between [ and ] what is supervised; (2) stands for a picture of two tokens. SYSTEM is the same in all.
SYSTEM = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant "
    "▁gives ▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user ' s ▁questions . "
)
FRONT = "▁US ER : ▁ (2) ▁ <0x0A> What ▁is ▁it ? ▁ASSIST ANT : [ ▁A ▁red ▁circle . </s> ]"
VECTORS = {
    "without a picture": (["What is it?", "Yes."], "▁US ER : ▁What ▁is ▁it ? ▁ASSIST ANT : [ ▁Yes . </s> ]"),
    "the picture in front": ([f"{IMAGE}\nWhat is it?", "A red circle."], FRONT),
    "the picture at the end": (
        [f"What is it?\n{IMAGE}", "No."],
        "▁US ER : ▁What ▁is ▁it ? <0x0A> (2) ▁ ▁ASSIST ANT : [ ▁No . </s> ]",
    ),
    "the picture in the middle": (
        [f"Is {IMAGE} red?", "No."],
        "▁US ER : ▁Is ▁ (2) ▁ ▁red ? ▁ASSIST ANT : [ ▁No . </s> ]",
    ),
    "two pictures": (
        [f"{IMAGE}{IMAGE} red?", "No."],
        "▁US ER : ▁ (2) (2) ▁ ▁red ? ▁ASSIST ANT : [ ▁No . </s> ]",
    ),
    "an answer of lines": (["What?", "\nYes."], "▁US ER : ▁What ? ▁ASSIST ANT : [ ▁ <0x0A> Yes . </s> ]"),
    "an answer with spaces": (["What?", " Yes. "], "▁US ER : ▁What ? ▁ASSIST ANT : [ ▁ ▁Yes . ▁ </s> ]"),
}
# What follows "</s>" is where tokenizers differ: a legacy one puts a space before it.
ROUNDS = [f"{IMAGE}\nWhat is it?", "A red circle.", "Is it red?", "Yes."]
SECOND = {
    "legacy": " ▁US ER : ▁Is ▁it ▁red ? ▁ASSIST ANT : [ ▁Yes . </s> ]",
    "not legacy": " USER : ▁Is ▁it ▁red ? ▁ASSIST ANT : [ ▁Yes . </s> ]",
}


def _turns(said: list[str]) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said)]


def _read(vector: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    supervised = False
    for piece in (SYSTEM + vector).split():
        if piece in "[]":
            supervised = piece == "["
            continue
        new = [IMAGE_ID] * 2 if piece == "(2)" else [tokenizer.convert_tokens_to_ids(piece)]
        assert tokenizer.unk_token_id not in new, piece
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
    return ids, labels


@pytest.mark.parametrize("name", VECTORS)
def test_ids_and_labels_are_those_written_by_hand(chat: Chat, name: str) -> None:
    said, vector = VECTORS[name]
    assert chat.encode(_turns(said)) == _read(vector, chat.tokenizer)
    before = vector[: vector.index("[")]
    assert chat.prompt(_turns(said[:1])) == _read(before, chat.tokenizer)[0]


def test_two_rounds(chat: Chat) -> None:
    legacy = "legacy" if chat.tokenizer.legacy else "not legacy"
    assert chat.encode(_turns(ROUNDS)) == _read(FRONT + SECOND[legacy], chat.tokenizer)


def test_plain_is_one_chunk_after_the_picture(chat: Chat) -> None:
    plain = Chat(chat.tokenizer, "plain", 2)
    ids, labels = _read("(2) [ ▁A ▁red ▁circle . </s> ]", chat.tokenizer)
    system = len(SYSTEM.split()) - 1  # all but BOS
    expected = ids[:1] + ids[1 + system :], labels[:1] + labels[1 + system :]
    assert plain.encode(_turns([f"Describe it. {IMAGE}", "A red circle."])) == expected


# ---- Against SentencePiece itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The model as it was trained, which puts a space before a text, and one that does not."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(trained.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_file=str(trained)), bare


words = st.sampled_from(
    ["What", "is", "red", "circle.", "x", "né", "你", "\U0001f408", "12", "\n", "  ", "USER:", "A"]
)
speech = st.lists(words, min_size=1, max_size=6).map(" ".join) | st.lists(words, min_size=1, max_size=6).map(
    "".join
)


@given(
    questions=st.lists(st.lists(speech, min_size=1, max_size=3), min_size=1, max_size=3),
    answers=st.lists(speech, min_size=3, max_size=3),
)
def test_ids_are_sentencepieces_own(
    chat: Chat, processors: tuple[Any, Any], questions: list[list[str]], answers: list[str]
) -> None:
    """Pictures stand between the parts of a question."""
    turns, text = [], f"{VICUNA_SYSTEM} "
    for question, answer in zip(questions, answers, strict=False):
        turns += [Turn("user", IMAGE.join(question)), Turn("assistant", answer)]
        text += f"USER: {IMAGE.join(question)} ASSISTANT: {answer}</s>"
    expected = [1]
    for number, chunk in enumerate(text.split(IMAGE)):
        expected += [IMAGE_ID] * 2 * (number > 0)
        for place, stretch in enumerate(chunk.split("</s>")):
            expected += [2] * (place > 0)
            if stretch:
                expected += processors[place > 0 and not chat.tokenizer.legacy].encode(stretch)
    assert chat.encode(turns)[0] == expected

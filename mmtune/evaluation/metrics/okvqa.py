"""OKVQA's official files, VQAv2's layout with stemmed answers, and predictions stemmed likewise on request.

An answer of OKVQA 1.1 is stored stemmed (`surf`), with what the annotator wrote (`surfing`) as `raw_answer`.
A model that says "surfing" is wrong under the rules as they are; BLIP-2 went from 35 to 40 by lemmatising
its predictions (LAVIS, issue 156). `lemmatised` does this, and is `vqa_legacy` otherwise; published numbers
were made with other lemmatisers (LAVIS: spaCy's en_core_web_sm on nouns and verbs; OpenFlamingo: NLTK and
inflection), so a score that is to equal one of them is made by lemmatising the predictions beforehand.

`lorasculpt` (LLaVA-HR's script) is `vqa_legacy`, `lmms-eval` (lmms_eval/tasks/ok_vqa/utils.py) `m4c`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import vqa
from mmtune.evaluation.metrics.base import Question, Rule
from mmtune.evaluation.metrics.vqav2 import files, read_layout

__all__ = ["METRIC", "RULES", "also", "files", "lemmatiser", "read"]

METRIC = "soft_accuracy"
ANSWERS = ("answer", "raw_answer")


def read(
    path: Path,
    image: str = "COCO_val2014_{image_id:012d}.jpg",
    questions: str | None = None,
    answers: str = "answer",
) -> list[Question]:
    """The questions of OKVQA's mscoco_val2014_annotations.json, as `vqav2.read` has them, by question type.

    `answers`: "answer", the stemmed ones of the official score, or "raw_answer". Raises UserError.
    """
    if answers not in ANSWERS:
        raise UserError(f"answers: '{answers}' is neither of {' and '.join(ANSWERS)}")
    return read_layout(path, image, questions, answers, ("question_type",))


@cache
def lemmatiser() -> Callable[[str], str]:
    """A function from a text to its lemmas, after the procedure that stemmed OKVQA's answers.

    Words in -ing become verbs' lemmas, others the singular they may be a plural of.
    Raises UserError where lemminflect is not installed.
    """
    try:
        from lemminflect import getAllLemmas, getLemma
    except ImportError:
        raise UserError(
            "the rule 'lemmatised' needs the package lemminflect", mend="pip install lemminflect"
        ) from None

    def lemma(word: str) -> str:
        kind = "VERB" if word.endswith("ing") else "NOUN"
        # "was" is no noun, and must not become one; "frisbees" is in no dictionary, and its s goes.
        known = bool(getAllLemmas(word))
        return str((getLemma(word, kind, lemmatize_oov=not known) or (word,))[0])

    return lambda text: " ".join(lemma(word) for word in text.lower().split())


def lemmatised(question: Question, prediction: str) -> float:
    """`vqa_legacy` of the normalised prediction's lemmas. Raises UserError as `lemmatiser` does."""
    return vqa.vqa_legacy(question, lemmatiser()(vqa.normalise_vqa(prediction)))


RULES: dict[str, Rule] = {
    **vqa.RULES,
    "lorasculpt": vqa.vqa_legacy,
    "lmms-eval": vqa.m4c,
    "lemmatised": lemmatised,
}


def also(
    questions: Sequence[Question], predictions: Mapping[str, str], rule: str, scores: Sequence[float]
) -> dict[str, Any]:
    """Which lemmatiser was at work, where one was."""
    return {"lemmatiser": f"lemminflect {version('lemminflect')}"} if rule == "lemmatised" else {}

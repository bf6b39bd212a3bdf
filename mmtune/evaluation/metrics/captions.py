"""Captions against several references: CIDEr-D, and beside it BLEU-1 to 4, ROUGE-L, METEOR and SPICE.

* CIDEr-D: Vedantam et al. 2015, arXiv 1411.5726, equations 1 to 3 and section 6, as coco-caption computes it.
* BLEU: Papineni et al. 2002, section 2, over the whole corpus, with the closest reference's length.
* ROUGE-L: Lin 2004, section 4, with beta 1.2 and the best precision and recall over the references.
* METEOR and SPICE are programs in Java; they are run where asked for (rule `cider_ptb`), never imitated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.evaluation.metrics.base import OverAll, Question, Rule, checked, field, image_path, some
from mmtune.evaluation.metrics.coco_java import java_tokens, meteor, spice
from mmtune.evaluation.metrics.ptb import tokenise

METRIC = "cider_d"
UNIT = "CIDEr x 100"

Words = tuple[str, ...]
Cut = Callable[[tuple[str, ...]], list[Words]]
"""Cuts captions into words, all at once."""

ORDER = 4
SIGMA = 6.0
BETA = 1.2


@lru_cache(maxsize=1 << 15)
def _tokenise(caption: str) -> Words:
    return tuple(tokenise(caption))


def python_tokens(captions: tuple[str, ...]) -> list[Words]:
    """Each text as words by our own tokeniser, after Stanford's PTBTokenizer (metrics/ptb.py)."""
    return [_tokenise(caption) for caption in captions]


def ngrams(words: Words) -> Counter[Words]:
    """How often each n-gram of 1 to 4 words is there. A no-break space parts a word, as officially."""
    parted = [part for word in words for part in word.split("\u00a0")]
    return Counter(
        tuple(parted[start : start + n]) for n in range(1, ORDER + 1) for start in range(len(parted) - n + 1)
    )


class _Vector(NamedTuple):
    """A caption as CIDEr-D sees it."""

    weights: list[dict[Words, float]]
    """For n = 1 to 4: n-gram -> tf-idf."""
    norms: list[float]
    length: int
    """In bigrams, as in the official code: captions of no word and of one are alike."""


class CiderD:
    """CIDEr-D, given the references of all images, which say how rare an n-gram is.

    references: for each image its references, cut into words. An n-gram's document frequency is the number
    of images with a reference that has it, so it does not depend on what was predicted, nor on how much.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self._images = math.log(len(references))
        self._frequency: Counter[Words] = Counter()
        for of_image in references:
            self._frequency.update({gram for words in of_image for gram in ngrams(words)})

    def score(self, words: Words, references: Sequence[Words]) -> float:
        """Of one caption against its image's references: 0 to 10."""
        caption = self._vector(words)
        similar = [self._similarity(caption, self._vector(each)) for each in references]
        return 10 * math.fsum(similar) / len(references)

    def _vector(self, words: Words) -> _Vector:
        weights: list[dict[Words, float]] = [{} for _ in range(ORDER)]
        counts = ngrams(words)
        for gram, count in counts.items():
            rarity = self._images - math.log(max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(math.fsum(weight * weight for weight in each.values())) for each in weights]
        return _Vector(weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2))

    def _similarity(self, caption: _Vector, reference: _Vector) -> float:
        """The clipped cosine, averaged over n, times the penalty for another length."""
        cosines = []
        for n in range(ORDER):
            theirs = reference.weights[n]
            product = math.fsum(
                min(weight, theirs[gram]) * theirs[gram]
                for gram, weight in caption.weights[n].items()
                if gram in theirs
            )
            norm = caption.norms[n] * reference.norms[n]
            cosines.append(product / norm if norm else 0.0)
        apart = caption.length - reference.length
        return math.exp(-(apart**2) / (2 * SIGMA**2)) * math.fsum(cosines) / ORDER


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to 4 of all captions together, 0 to 1; an n-gram order without a match makes the rest 0.

    Each caption is held against the reference nearest in length, the shorter of two as near.
    """
    length = nearest = 0
    matched, possible = [0] * ORDER, [0] * ORDER
    for words, several in zip(captions, references, strict=True):
        counts = ngrams(words)
        allowed: Counter[Words] = Counter()
        for each in several:
            allowed |= ngrams(each)
        for gram, count in counts.items():
            possible[len(gram) - 1] += count
            matched[len(gram) - 1] += min(count, allowed[gram])
        size = _size(counts)
        length += size
        nearest += min(
            (_size(ngrams(each)) for each in several), key=lambda other: (abs(other - size), other)
        )
    if not length:
        return [0.0] * ORDER
    brevity = min(1.0, math.exp(1 - nearest / length))
    precisions = [hit / tried if tried else 0.0 for hit, tried in zip(matched, possible, strict=True)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, ORDER + 1)]


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """ROUGE-L of one caption, 0 to 1: the longest common subsequence's best precision and best recall."""
    common = [_longest_common(words, each) for each in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(same / len(each) for same, each in zip(common, references, strict=True) if each)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _size(counts: Counter[Words]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 1)


def _longest_common(one: Words, other: Words) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, candidate in enumerate(other):
            row.append(before[place] + 1 if word == candidate else max(before[place + 1], row[place]))
    return row[-1]


def _cider(cut: Cut) -> OverAll:
    def prepare(questions: Sequence[Question], predictions: Mapping[str, str]) -> Rule:
        words, references = _all_cut(questions, predictions, cut)
        scorer = CiderD(list(references.values()))
        return lambda question, _: scorer.score(words[question.id], references[question.id])

    return OverAll(prepare)


RULES: dict[str, OverAll] = {"cider": _cider(python_tokens), "cider_ptb": _cider(java_tokens)}


def also(
    questions: Sequence[Question], predictions: Mapping[str, str], rule: str, scores: Sequence[float]
) -> dict[str, Any]:
    """BLEU-1 to 4, ROUGE-L and the tokeniser's name; with `cider_ptb` METEOR and SPICE. In points of 100.

    A missing caption is an empty one: it scores 0, and lengthens the references that BLEU's brevity penalty
    sees. `absent` says why METEOR or SPICE is not there.
    """
    official = rule == "cider_ptb"
    words, references = _all_cut(questions, predictions, java_tokens if official else python_tokens)
    figures: dict[str, Any] = {"tokenizer": "ptb" if official else "python"}
    for n, score in enumerate(bleu(list(words.values()), list(references.values())), start=1):
        figures[f"BLEU-{n}"] = 100 * score
    each = [rouge_l(words[question.id], references[question.id]) for question in questions]
    figures["ROUGE-L"] = 100 * math.fsum(each) / len(each)
    if not official:
        reason = "a program in Java; the rule cider_ptb runs it"
        return {**figures, "absent": {"METEOR": reason, "SPICE": reason}}
    written = {image: " ".join(caption) for image, caption in words.items()}
    given = {image: [" ".join(caption) for caption in several] for image, several in references.items()}
    figures["METEOR"] = 100 * meteor(written, given)
    found = spice(written, given)
    if found is None:
        return {**figures, "absent": {"SPICE": "its models, which pycocoevalcap fetches, are not there"}}
    return {**figures, "SPICE": 100 * found}


def warn(questions: Sequence[Question], predictions: Mapping[str, str]) -> list[str]:
    """What makes a score of these questions misleading."""
    if len(questions) > 1:
        return []
    return ["CIDEr of one image alone is 0: there is no other to say which words are rare"]


def _all_cut(
    questions: Sequence[Question], predictions: Mapping[str, str], cut: Cut
) -> tuple[dict[str, Words], dict[str, list[Words]]]:
    """The words of each image's caption (none where it is missing) and of its references."""
    captions = cut(tuple(predictions.get(question.id, "") for question in questions))
    references = iter(cut(tuple(answer for question in questions for answer in question.answers)))
    return (
        {question.id: words for question, words in zip(questions, captions, strict=True)},
        {question.id: [next(references) for _ in question.answers] for question in questions},
    )


def read(path: Path, split: str = "test", image: str = "") -> list[Question]:
    """The images of a caption file, each a question whose answers are its captions.

    Either COCO's layout, {images, annotations: [{image_id, id, caption}]}, all of it; or Karpathy's,
    {images: [{split, filename, sentences: [{raw}]}]}, where `split` is taken and an image's id is its
    `cocoid` or, in Flickr30k, its file's name without the ending. `image` says how a picture's path is made
    of its id, for files of COCO's layout; without it the file's own `file_name` is taken.
    Raises UserError, naming file and image, for broken rows and for images without captions.
    """
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and "annotations" not in content:
        return checked(_karpathy(images, split, path), path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(
            "neither 'annotations' nor 'images' with sentences in it",
            where=path,
            mend="A file such as captions_test5k.json, or Karpathy's dataset_coco.json, is expected.",
        )
    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for number, row in enumerate(images or []):
        where = f"{path}, images[{number}]"
        identity = str(field(_object(row, where), "id", (int, str), where))
        if identity in captions:
            raise UserError(f"image {identity} occurs more than once", where=where, mend="Keep one of them.")
        captions[identity] = []
        names[identity] = str(row.get("file_name") or "")
    for number, row in enumerate(content["annotations"]):
        where = f"{path}, annotations[{number}]"
        identity = str(field(_object(row, where), "image_id", (int, str), where))
        if images and identity not in captions:
            raise UserError(
                f"image {identity} is not among 'images'", where=where, mend="Fetch the file anew."
            )
        captions.setdefault(identity, []).append(field(row, "caption", str, where))
    without = [identity for identity, several in captions.items() if not several]
    if without:
        raise UserError(f"images without captions: {some(without)}", where=path, mend="Leave them out.")
    return checked(
        [
            _question(identity, several, _picture(image, identity) or names.get(identity) or None)
            for identity, several in captions.items()
        ],
        path,
    )


def _karpathy(images: list[Any], split: str, path: Path) -> list[Question]:
    questions, splits = [], set()
    for number, row in enumerate(images):
        where = f"{path}, images[{number}]"
        splits.add(field(_object(row, where), "split", str, where))
        if row["split"] != split:
            continue
        name = field(row, "filename", str, where)
        identity = str(row["cocoid"]) if "cocoid" in row else Path(name).stem
        sentences = field(row, "sentences", list, where)
        captions = [field(_object(each, where), "raw", str, where) for each in sentences]
        if not captions:
            raise UserError(f"image {identity} has no sentences", where=where, mend="Fetch the file anew.")
        questions.append(_question(identity, captions, str(Path(str(row.get("filepath", ""))) / name)))
    if not questions:
        raise UserError(
            f"no images of split '{split}'", where=path, mend=f"Known: {', '.join(sorted(splits))}."
        )
    return questions


def _question(identity: str, captions: list[str], picture: str | None) -> Question:
    return Question(id=identity, text="", answers=tuple(captions), image=picture, cluster=identity)


def _picture(template: str, identity: str) -> str:
    """The picture's path; nothing for a template that pads numbers where the id is none."""
    if not identity.isdecimal():
        return "" if ":" in template else image_path(template, identity)
    return image_path(template, int(identity))


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(
            f"expected an object, found {type(row).__name__}", where=where, mend="Fetch the file anew."
        )
    return row

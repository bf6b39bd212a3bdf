"""The programs in Java that come with the package pycocoevalcap: PTBTokenizer, METEOR, SPICE.

Neither Java nor the package is needed otherwise. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.ptb import PUNCTUATION

JAR = "stanford-corenlp-3.4.1.jar"
SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"


def absent() -> str | None:
    """What is missing to run the official programs, in words; None where all is there."""
    if shutil.which("java") is None:
        return "Java is not installed"
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "the package pycocoevalcap is not installed"
    return None


@lru_cache(maxsize=4)
def java_tokens(captions: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The words of captions, as the official tokeniser cuts them. Raises UserError where it is absent.

    It reads one caption per line, so line breaks of any kind go first, and captions without a word are left
    out.
    """
    missing = absent()
    if missing:
        raise UserError(
            f"the official caption tokeniser cannot run: {missing}",
            mend="pip install pycocoevalcap, and install Java; or use the rule cider, which needs neither.",
        )
    lines = [" ".join(caption.split()) for caption in captions]
    spoken = [number for number, line in enumerate(lines) if line]
    tokens: list[tuple[str, ...]] = [()] * len(lines)
    if not spoken:
        return tokens
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(lines[number] for number in spoken) + "\n")
        file.flush()
        # Without the encoding Java takes that of the locale and loses the accents.
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(_package() / "tokenizer" / JAR)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file.name]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    cut = done.stdout.split("\n")[:-1]
    if done.returncode or len(cut) != len(spoken):
        raise UserError(
            f"the official caption tokeniser failed: {done.stderr.strip()[-300:]}",
            mend="The rule cider needs no Java.",
        )
    for number, line in zip(spoken, cut, strict=True):
        tokens[number] = tuple(word for word in line.rstrip().split(" ") if word and word not in PUNCTUATION)
    return tokens


def meteor(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """METEOR 1.5 of captions cut into words, 0 to 1, by the official program."""
    return _run("meteor.meteor", "Meteor", captions, references)


def spice(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float | None:
    """SPICE of captions cut into words, 0 to 1; None where its models, 300 MB apart, are not there."""
    if not (_package() / "spice" / "lib" / SPICE_MODELS).is_file():
        return None
    return _run("spice.spice", "Spice", captions, references)


def _run(
    module: str, name: str, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> float:
    scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    score, _ = scorer.compute_score(
        {image: list(several) for image, several in references.items()},
        {image: [caption] for image, caption in captions.items()},
    )
    return float(score)


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import coco_java

STAND_IN = """
class Spice:
    def compute_score(self, references, captions):
        assert references == {"1": ["a dog", "the dog"]} and captions == {"1": ["dog"]}
        return 0.25, []
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for pycocoevalcap, whose SPICE needs models that are fetched apart."""
    _forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    place = tmp_path / "pycocoevalcap"
    (place / "spice" / "lib").mkdir(parents=True)
    (place / "__init__.py").touch()
    (place / "spice" / "__init__.py").touch()
    (place / "spice" / "spice.py").write_text(STAND_IN)
    yield place
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        del sys.modules[name]


def test_spice_is_run_only_where_its_models_are(package: Path) -> None:
    references = {"1": ("a dog", "the dog")}
    assert coco_java.spice({"1": "dog"}, references) is None
    (package / "spice" / "lib" / coco_java.SPICE_MODELS).touch()
    assert coco_java.spice({"1": "dog"}, references) == 0.25


def test_what_is_missing_is_said(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert coco_java.absent() == "Java is not installed"
    with pytest.raises(UserError, match=r"cannot run: Java is not installed(.|\n)*the rule cider"):
        coco_java.java_tokens(("never asked before",))


def test_a_program_that_fails_is_reported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = package.parent / "java"
    java.write_text("#!/bin/sh\necho no such jar >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{package.parent}:/usr/bin:/bin")
    with pytest.raises(UserError, match="the official caption tokeniser failed: no such jar"):
        coco_java.java_tokens(("nor this",))

"""Which part can be put back, and from where: every refusal, on files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.restore import check_restorable, find_base
from mmtune.parts.fingerprint import model_hash


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A run whose final model is its base but for the connector; only its files are looked at."""
    base, final = tmp_path / "base", tmp_path / "run" / "final"
    shutil.copytree(world / "base", base)
    shutil.copytree(world / "base", final)
    with open(final / "connector" / "model.safetensors", "ab") as file:
        file.write(b"trained")
    (final / "trained.json").write_text(json.dumps({"base": model_hash(base)}))
    (tmp_path / "run" / "run.yaml").write_text(f"model: {{base: {base}}}")
    return tmp_path / "run"


def test_the_base_is_where_the_run_says_or_the_user(run: Path, tmp_path: Path) -> None:
    assert find_base(run / "final") == tmp_path / "base"
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere")
    assert find_base(run / "final", tmp_path / "elsewhere") == tmp_path / "elsewhere"
    (run / "run.yaml").unlink()
    assert find_base(run / "final", tmp_path / "base") == tmp_path / "base"
    with pytest.raises(UserError, match="is not known to lie anywhere") as caught:
        find_base(run / "final")
    assert "--base DIR" in str(caught.value)


def test_a_base_that_is_gone_or_another(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="but this is model") as caught:
        find_base(run / "final", run / "final")
    assert model_hash(tmp_path / "base") in str(caught.value)
    (tmp_path / "base" / "connector" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="but this is model"):
        find_base(run / "final")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=f"is no longer at {tmp_path}/base"):
        find_base(run / "final")
    with pytest.raises(UserError, match="no such folder"):
        find_base(run / "final", tmp_path / "base")


def test_a_model_without_a_base(run: Path, tmp_path: Path) -> None:
    (run / "final" / "trained.json").write_text(json.dumps({"base": None}))
    with pytest.raises(UserError, match="started from no saved model as a whole"):
        find_base(run / "final", tmp_path / "base")
    with pytest.raises(UserError, match="it does not say what it was trained from"):
        find_base(tmp_path / "base", tmp_path / "base")


def test_only_what_trained_can_be_put_back(run: Path, tmp_path: Path) -> None:
    check_restorable(run / "final", "connector", tmp_path / "base")
    for part in ("vision", "language"):
        with pytest.raises(UserError, match=f"its {part} did not train") as caught:
            check_restorable(run / "final", part, tmp_path / "base")
        assert "What trained: connector." in str(caught.value)

"""What is stamped into results: versions, and the commit of a checkout."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtune.core import versions


@pytest.fixture
def commit(tmp_path: Path) -> Callable[[], str | None]:
    """`commit` as it is in a checkout of its own, which is not under git yet."""
    file = tmp_path / "mmtune" / "core" / "versions.py"
    file.parent.mkdir(parents=True)
    shutil.copy(versions.__file__, file)
    spec = importlib.util.spec_from_file_location("versions_elsewhere", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[], str | None] = module.commit
    return found


def test_versions_of_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "no-such-package"))
    found = versions.versions()
    assert found.keys() == {"python", "torch", "no-such-package"}
    assert found["no-such-package"] == "not installed"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirty_mark(tmp_path: Path, commit: Callable[[], str | None]) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        ran = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    assert commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    git("tag", "v1")
    assert commit() == head
    (tmp_path / "untracked").touch()
    assert commit() == head
    (tmp_path / "mmtune/core/versions.py").write_text("changed")
    assert commit() == f"{head}-dirty"


def test_no_commit_without_git(
    tmp_path: Path, commit: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    assert commit() is None  # broken
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None

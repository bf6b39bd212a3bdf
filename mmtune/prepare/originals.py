"""Datasets as they were published: what each consists of, where it is found, and how it comes into place.

data/originals/NAME.yaml lists the files of a set, from where, and under which licence. They are linked to
where cards and protocols read them, or unpacked there; what a user has is never moved or changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmtune.core.config import parse_named
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import inside, replacing, replacing_folder, share, writing


@dataclass
class Original:
    """Files or folders that are published together.

    paths: where protocols read them, relative to the set's root. url: the file itself, an archive, or a page
    that leads to them. inside: the folder in which the archive holds them. also_in: further folders,
    relative to where the originals lie, in which they may be; also_as: other names of a single path there.
    member: what the archive calls a single path; `.` is all that is in it. instead: a folder that may already
    hold all that is needed of them. needed_for: scores; training data only; or more
    than either, so that it may be absent. task: the only one that reads it, which partial data may go
    without. bytes, sha256: of what the url gives, as `confirmed_by` has them.
    """

    paths: list[str]
    url: str
    inside: str = ""
    also_in: list[str] = field(default_factory=list)
    also_as: list[str] = field(default_factory=list)
    member: str = ""
    instead: str = ""
    needed_for: Literal["evaluation", "training", "more"] = "evaluation"
    task: str = ""
    bytes: int | None = None
    sha256: str | None = None
    confirmed_by: str = ""

    @property
    def name(self) -> str:
        """The name under which the download is saved, as long as the url is a file's."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def size(self) -> str:
        return "" if self.bytes is None else f"{self.bytes / 1e9:.2f} GB, "


@dataclass
class Converted:
    """A file that others made of a set, in LLaVA's formats, and how it is used where a user has it.

    task, split: the protocol that asks in its words; against: a protocol of the official questions, where the
    task reads nothing but this file. card, split: the card that trains on it. made_by: the card whose
    questions stand in for it where it is not at hand.
    """

    path: str
    whose: str
    split: str
    also_in: list[str] = field(default_factory=list)
    task: str = ""
    against: str = ""
    card: str = ""
    made_by: str = ""


@dataclass
class Released:
    """A training file that is published as such, in LLaVA's format, and the card that trains on it.

    samples: how many it has; of: how many with pictures in each folder, and `text` without any.
    """

    path: str
    card: str
    samples: int
    split: str = "train"
    of: dict[str, int] = field(default_factory=dict)


@dataclass
class Originals:
    """A set as it was published. tasks, cards: what reads it. gathered_from: folders out of which pictures
    are linked to where the protocol reads them. counted: tasks whose pictures need not all be there, for
    another asks a sample of their questions.
    """

    name: str
    about: str
    licence: str
    page: str
    root: Path
    tasks: list[str]
    cards: list[str]
    originals: list[Original]
    converted: list[Converted] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)
    gathered_from: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)


def originals_names() -> list[str]:
    return sorted(path.stem for path in (share("data") / "originals").glob("*.yaml"))


def load_originals(name: str) -> Originals:
    """A set by name. Raises UserError that lists the known ones."""
    found: Originals = parse_named(Originals, "dataset", share("data") / "originals", name)
    return found


def find(path: str, places: Sequence[str], source: Path, root: Path) -> Path | None:
    """Where `path` lies: in `source`, in `root`, or in one of `places` relative to the two.

    `..` leads to what lies beside the folder as it is named, also where it is a link.
    """
    for folder in (source, root):
        for place in ("", *places):
            found = Path(os.path.normpath(folder / place / path))
            if found.exists():
                return found
    return None


def absent(wanted: Sequence[Original], source: Path, root: Path, licence: str) -> list[Fault]:
    """A fault for each download of which something is not there, with where to get it."""
    faults: dict[str, Fault] = {}
    missing: dict[str, list[str]] = {}
    for original in wanted:
        paths = [path for path in original.paths if _found(original, path, source, root) is None]
        elsewhere = original.instead and find(original.instead, [], source, root)
        if paths and not elsewhere and _archive(original, source, root) is None:
            missing.setdefault(original.url, []).extend(paths)
            what = f"not there: {', '.join(missing[original.url])}"
            mend = f"Get it from {original.url} ({original.size}{licence}). It may stay as it comes: "
            mend += "--source DIR says where it lies."
            if original.needed_for == "training":
                mend += " Only training needs it: --cards none goes without."
            if original.task:
                mend += f" Only the task {original.task} needs it: --partial goes without."
            faults[original.url] = Fault(what, str(source), mend)
    return list(faults.values())


def _found(original: Original, path: str, source: Path, root: Path) -> Path | None:
    places = [original.inside, *original.also_in]
    named = (find(name, places, source, root) for name in (path, *original.also_as))
    return next((found for found in named if found is not None), None)


def _archive(original: Original, source: Path, root: Path) -> Path | None:
    """Where a downloaded archive lies: beside what is to come out of it, for several are named images.zip."""
    if not original.url.endswith(".zip"):
        return None
    beside = [(folder / original.paths[0]).parent / original.name for folder in (source, root)]
    return next((archive for archive in beside if archive.is_file()), None)


def place(original: Original, source: Path, root: Path, exact: bool) -> Iterator[str]:
    """Brings an original, which is there, to where it is read; says of each step what it is, before it.

    What is in place already stays, but for a link of before where `source` has another.
    exact: compares a download with its published hash. Raises UserError where it is another, and for an
    archive that is broken or lacks what it should hold.
    """
    archive = _archive(original, source, root)
    compared = not exact
    for path in original.paths:
        target = root / path
        found = _found(original, path, source, root)
        if exact and found is not None and found.name == original.name:  # the download itself, no archive
            compare(found, original)
        if target.exists() and not (target.is_symlink() and found and not found.samefile(target)):
            continue
        if found is not None:
            yield f"{target}: a link to {found}"
            link(target, found)
        elif archive is not None:
            yield f"{target}: out of {archive}"
            if not compared:
                compare(archive, original)
                compared = True
            unpack(archive, original.member or f"{original.inside}/{path}".lstrip("/"), target)


def link(target: Path, found: Path) -> None:
    """A symbolic link at `target`, relative within one set and to the set beside it. Raises UserError."""
    found = Path(os.path.abspath(found))
    near = os.path.relpath(found, target.parent)
    beneath = found.is_relative_to(os.path.abspath(target.parent.parent))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()
        # Where the set's own folder is a link, `..` leads elsewhere.
        target.symlink_to(near if beneath and (target.parent / near).exists() else found)


def compare(path: Path, original: Original) -> None:
    """Raises UserError where a downloaded file is not the published one, as far as its hash is known."""
    if original.bytes is not None and path.stat().st_size != original.bytes:
        what = f"it has {path.stat().st_size:,} bytes, published are {original.bytes:,}"
    elif original.sha256 is not None and sha256(path) != original.sha256:
        what = f"its SHA-256 is not that of the published file, {original.sha256}"
    else:
        return
    raise UserError(
        f"{what} ({original.confirmed_by})",
        where=path,
        mend=f"Fetch it anew from {original.url}. --partial takes it as it is.",
    )


def sha256(path: Path) -> str:
    """The hash of a file. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path, mend="Look at its disk.") from None


def unpack(archive: Path, member: str, target: Path) -> None:
    """A file of a zip archive, or a folder with all that is in it, written to `target` whole or not at all.

    member: its name there; `.` for all that is in the archive.
    Raises UserError where the archive is broken, lacks it, or names a file outside of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            beneath = "" if member == "." else f"{member}/"
            names = [name for name in opened.namelist() if name == member or name.startswith(beneath)]
            if not names:
                raise UserError(f"there is no {member} in it", where=archive, mend="Is it the right archive?")
            if names == [member]:
                with replacing(target) as temporary:
                    _extract(opened, member, temporary)
                return
            with replacing_folder(target) as folder:
                for name in names:
                    if not name.endswith("/"):
                        _extract(opened, name, inside(folder, name[len(beneath) :]))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"a broken archive: {error}", where=archive, mend="Fetch it anew.") from None


def _extract(opened: zipfile.ZipFile, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(name) as packed, open(target, "wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)

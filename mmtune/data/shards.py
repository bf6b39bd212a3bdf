"""webdataset shards: tars that hold LLaVA rows and their pictures, in place of a training file and a folder.

A sample is all that shares a key and lies together: `KEY.json`, its row, and its pictures, `KEY.jpg` where it
has one, `KEY.0.jpg`, `KEY.1.jpg` and so on where it has several. Nothing is streamed: the headers say where
each file lies, so that a picture is read by itself once its batch is due, and the order of the samples, a
resumed run and several processes are what they are with a folder.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mmtune.core.errors import Fault, UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
_SHARD = re.compile(r"\.(tar(\.\w+)?|tgz)$")
_PICTURE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(PICTURES)})")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "zstd -d"}
_BLOCK = 512  # bytes, what a tar is made of; one of zeros marks its end
_ANEW = "Was it written whole? Make or fetch it anew."


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in a tar that is not compressed: `size` bytes from `offset` on."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}, {self.name}"

    def read(self) -> bytes:
        """Its content. Raises UserError where the shard has been cut since it was indexed."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise UserError("the shard ends before this file does", where=self, mend=_ANEW)
        return content


def is_shards(path: Path) -> bool:
    """Whether a path of training data names shards: `train-{000000..000007}.tar`, `train-*.tar`."""
    return _SHARD.search(str(path)) is not None


def shard_files(pattern: Path) -> list[Path]:
    """The shards that a path names, in order: {000000..000007}, {a,b} as in a shell, * and ? sorted by name.

    Raises UserError with those that are not there.
    """
    from braceexpand import braceexpand

    if os.path.isfile(pattern):
        return [pattern]
    found: list[Path] = []
    faults = []
    for one in braceexpand(str(pattern)):
        matching = [one] if os.path.isfile(one) else sorted(glob.glob(one))
        found += map(Path, matching)
        if not matching:
            faults.append(Fault(f"there is no shard {one}", mend="Is the path right?"))
    if faults:
        raise UserError.of(faults)
    return found


def index_shard(shard: Path) -> list[Stored]:
    """The files of a shard in their order, from the headers alone.

    Raises UserError where it is compressed, cut short, damaged, joined from several, or holds a link.
    """
    try:
        with open(shard, "rb") as file:
            start = file.read(8)
            for magic, unpack in _COMPRESSED.items():
                if start.startswith(magic):
                    what = "a compressed shard: its pictures cannot be reached one by one"
                    raise UserError(what, where=shard, mend=f"Unpack it first: {unpack} FILE.")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                _check_end(shard, tar)
    except tarfile.TarError as error:
        raise UserError(f"this shard cannot be read: {error}", where=shard, mend=_ANEW) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=shard, mend="Is the path right?") from None
    files = [member for member in members if not member.isdir()]
    if odd := [member.name for member in files if not member.isreg() or member.issparse()]:
        mend = "Pack files themselves: tar --dereference, without --sparse."
        raise UserError("a link, or no plain file", where=f"{shard}, {odd[0]}", mend=mend)
    return [Stored(shard, member.name, member.offset_data, member.size) for member in files]


def _check_end(shard: Path, tar: tarfile.TarFile) -> None:
    """tarfile ends in silence at a damaged header, and where the mark of the end is missing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
        what = f"this shard is cut short or damaged at byte {tar.offset}"
        raise UserError(what, where=shard, mend=_ANEW)
    while rest := tar.fileobj.read(2**20):
        if rest.strip(b"\0"):
            mend = "Where it was joined from several, name those: train-*.tar."
            raise UserError("this shard goes on after its end", where=shard, mend=mend)


def stored_samples(pattern: Path, limit: int | None = None) -> tuple[list[list[Stored]], list[Fault]]:
    """The files of each sample, at most `limit` samples, and the faults of shards. Raises UserError."""
    samples: list[list[Stored]] = []
    faults: list[Fault] = []
    for shard in shard_files(pattern):
        if limit is not None and len(samples) >= limit:
            break
        try:
            samples += _by_key(shard)
        except UserError as error:
            faults += error.faults
    return samples[:limit], faults


def _by_key(shard: Path) -> Iterator[list[Stored]]:
    known: set[str] = set()
    for key, files in groupby(index_shard(shard), lambda stored: key_and_ending(stored)[0]):
        if key in known:
            mend = "Put the files of a sample one after the other, and give each sample a key of its own."
            raise UserError(f"the key '{key}' comes again after another one", where=shard, mend=mend)
        known.add(key)
        yield list(files)


def key_and_ending(stored: Stored) -> tuple[str, str]:
    """What stands before and after the first dot of a file's name, as webdataset has it. Raises UserError."""
    from webdataset.tariterators import base_plus_ext

    key, ending = base_plus_ext(stored.name)
    if key is None:
        mend = "Name it KEY.json or KEY.jpg, or take it out: tar --delete."
        raise UserError("a file that belongs to no sample", where=stored, mend=mend)
    return str(key), str(ending).lower()


def row_and_pictures(files: list[Stored]) -> tuple[Stored, list[Stored]]:
    """The row of a sample and its pictures in their order. Raises UserError with what is amiss."""
    rows: list[Stored] = []
    pictures: dict[int | None, Stored] = {}
    faults = []
    for stored in files:
        ending = key_and_ending(stored)[1]
        match = _PICTURE.fullmatch(ending)
        number = int(match[1]) if match and match[1] else None
        if ending == "json" and not rows:
            rows.append(stored)
        elif match and number not in pictures:
            pictures[number] = stored
        elif match or ending == "json":
            faults.append(Fault("given twice", str(stored), "Keep one of the two."))
        else:
            mend = f"Of a sample KEY.json and pictures are read: {', '.join(PICTURES)}. Leave the rest out."
            faults.append(Fault("neither a row nor a picture", str(stored), mend))
    key = key_and_ending(files[0])[0]
    if not rows:
        faults.append(Fault(f"the sample '{key}' has no {key}.json", str(files[0].shard), _ANEW))
    numbers = sorted(number for number in pictures if number is not None)
    if numbers != list(range(len(numbers))) or (numbers and None in pictures):
        names = ", ".join(stored.name for stored in pictures.values())
        mend = f"Name a single picture {key}.jpg, several {key}.0.jpg, {key}.1.jpg and so on."
        what = f"the pictures of '{key}' are not numbered from 0 on: {names}"
        faults.append(Fault(what, str(files[0].shard), mend))
    if faults:
        raise UserError.of(faults)
    return rows[0], [pictures[number] for number in numbers or pictures]


def hash_shards(pattern: Path) -> bytes:
    """SHA-256 of the names and sizes of all files in the shards, and of the rows; pictures are not read."""
    digest = hashlib.sha256()
    for shard in shard_files(pattern):
        for stored in index_shard(shard):
            digest.update(f"{stored.name}\0{stored.size}\0".encode())
            if stored.name.lower().endswith(".json"):
                digest.update(stored.read())
    return digest.digest()

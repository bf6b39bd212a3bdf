"""A LLaVA training file and its pictures -> webdataset shards: the same samples in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import replacing_folder
from mmtune.data.image import is_there
from mmtune.data.samples import MOST_FAULTS, Sample, read_llava, read_rows
from mmtune.data.shards import PICTURES


def write_shards(path: Path, image_root: Path, destination: Path, samples_per_shard: int) -> Path:
    """Writes the folder `destination`, which must not exist; returns the name by which a run reads them.

    A row keeps all its keys, a picture its bytes, and the same input gives the same shards, byte for byte.
    Raises UserError with the first faulty samples and pictures, before anything is written.
    """
    from webdataset import TarWriter

    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Remove it, or give another folder.")
    samples = read_llava(path, image_root)
    rows = [row for _, row in read_rows(path)]
    _check_pictures(samples)
    count = -(-len(samples) // samples_per_shard)
    with replacing_folder(destination) as folder:
        for shard in range(count):
            start = shard * samples_per_shard
            with (
                open(folder / f"{path.stem}-{shard:06d}.tar", "wb") as file,
                TarWriter(file, encoder=False, mtime=0) as tar,
            ):
                for number in range(start, min(start + samples_per_shard, len(samples))):
                    tar.write(_packed(f"{number:09d}", rows[number], samples[number]))
    return destination / f"{path.stem}-{{{0:06d}..{count - 1:06d}}}.tar"


def _packed(key: str, row: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """What webdataset writes for a sample: its key, and the content of each file by what its name ends in."""
    packed: dict[str, Any] = {"__key__": key, "json": json.dumps(row, ensure_ascii=False).encode()}
    for number, picture in enumerate(sample.images):
        place = f"{number}." if len(sample.images) > 1 else ""
        packed[f"{place}{_ending(picture)}"] = Path(str(picture)).read_bytes()
    return packed


def _check_pictures(samples: list[Sample]) -> None:
    faults: dict[object, Fault] = {}
    for sample in samples:
        for picture in sample.images:
            if not is_there(picture):
                faults[picture] = Fault(f"no such picture: {picture}", sample.place, "Is image_root right?")
            elif _ending(picture) not in PICTURES:
                mend = f"Give it the ending of its kind: {', '.join(PICTURES)}."
                faults[picture] = Fault(f"not the name of a picture: {picture}", sample.place, mend)
    if faults:
        raise UserError.of(list(faults.values())[:MOST_FAULTS])


def _ending(picture: object) -> str:
    return Path(str(picture)).suffix.removeprefix(".").lower()

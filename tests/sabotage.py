"""The places in a run where tests/kill_and_resume.py kills it or fills its disk."""

from __future__ import annotations

import builtins
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

WRITES = ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync")
Die = Callable[[str], NoReturn]

MOMENTS = ("before", "in", "after")


def sabotage(kind: str, at: int, moment: str, die: Die) -> None:
    """Dies before, in or after the `at`-th time that the run comes to a place of this kind."""
    seen = 0

    def look(found: str, when: str, what: str) -> None:
        nonlocal seen
        if found != kind:
            return
        # Only a file that is being written has an inside.
        if seen == at and when in (moment, "after" if moment == "in" else moment):
            die(f"{when} {what}")
        seen += when == "after"

    watch(look)


Look = Callable[[str, str, str], None]


def watch(look: Look) -> None:
    """Has look(kind, moment, what) called wherever this process comes to a place of a kind."""
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from mmtune.parts.model import VisionLanguageModel
    from mmtune.training import loop
    from mmtune.tuning.sculpt import SculptTuner

    replace: Callable[[Any, str, Any], None] = setattr

    def around(owner: Any, name: str, kind: str, where: Callable[..., str | None]) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def watched(*args: Any, **kwargs: Any) -> Any:
            what = where(*args, **kwargs)
            if what is None:
                return plain(*args, **kwargs)
            look(kind, "before", what)
            made = plain(*args, **kwargs)
            look(kind, "after", what)
            return made

        replace(owner, name, watched)

    def opened(file: Any, mode: str = "r", *_: Any, **__: Any) -> str | None:
        return f"opening {short(file)}" if set(mode) & set("wax+") else None

    write = io.open

    def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        what = opened(file, mode)
        if what is None or isinstance(file, int):
            return write(file, mode, *args, **kwargs)
        look("write", "before", what)
        made: Any = write(file, mode, *args, **kwargs)
        if "b" not in mode:
            text = made.write

            def torn(said: str) -> int:
                half = len(said) // 2
                text(said[:half])
                made.flush()
                look("write", "in", f"writing {short(file)}")
                return half + text(said[half:])

            made.write = torn
        look("write", "after", what)
        return made

    replace(builtins, "open", open_watched)
    replace(io, "open", open_watched)
    for name in WRITES:
        around(os, name, "write", lambda path, *_, _name=name, **__: f"{_name} {short(path)}")

    serialize = safetensors.torch.serialize_file

    def serialized(tensors: Any, file: Any, **kwargs: Any) -> None:
        try:
            look("write", "before", f"writing {short(file)}")
            serialize(tensors, file, **kwargs)
            whole = Path(file).read_bytes()
            os.truncate(file, len(whole) // 2)
            look("write", "in", f"writing {short(file)}")
        except OSError as error:  # as its own: no OSError
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
        os.truncate(file, 0)
        with write(file, "wb") as again:
            again.write(whole)
        look("write", "after", f"writing {short(file)}")

    replace(safetensors.torch, "serialize_file", serialized)
    around(VisionLanguageModel, "forward", "micro-step", lambda *_: "a micro-step's forward pass")
    around(VisionLanguageModel, "generate", "evaluation", lambda *_: "a batch of answers")
    around(torch.optim.AdamW, "step", "optimiser", lambda *_: "the optimiser's step")
    around(
        SculptTuner,
        "after_step",
        "prune",
        lambda self, step: "the prune" if step == self.prune_step else None,
    )
    around(loop, "_train_stage", "stage", lambda *args: f"stage {args[1]}")
    around(loop, "load_weights", "resume", lambda *_: "loading a checkpoint")
    around(loop, "cut_metrics", "resume", lambda *_: "cutting metrics.jsonl")


def short(path: Any) -> str:
    """The last two names of a path."""
    return "/".join(Path(os.fsdecode(path)).parts[-2:]) if isinstance(path, (str, bytes, Path)) else "a file"

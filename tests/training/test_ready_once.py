"""DDP's "mark a variable ready only once", on one process and on two.

It takes reentrant checkpointing together with find_unused_parameters (which trainers switch on because an
adapter sits on a layer that is not used). Neither is done here; with both the same model fails.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mmtune.parts import VisionLanguageModel
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny

# (reentrant checkpointing, find_unused_parameters)
CASES = {"as-here": (False, False), "find-unused": (False, True), "reentrant": (True, True)}


def backward(folder: Path, rank: int, group: Any, reentrant: bool, unused: bool) -> str:
    """What one backward pass said."""
    model = VisionLanguageModel.from_pretrained(folder / "model").train()
    FullOptions(lr=1e-3).make().attach(model, "connector")
    for part in ("vision", "language"):
        LoraOptions(lr=1e-3, rank=2).make().attach(model, part)
        core = model.core(part)
        core.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            core.enable_input_require_grads()  # type: ignore[operator]
    wrapped = DistributedDataParallel(model, find_unused_parameters=unused, process_group=group)
    try:
        wrapped(tiny.batch([1, 2], seed=rank)).backward()
    except RuntimeError as error:
        return str(error)
    return "passed"


def process(rank: int, port: int, folder: str) -> None:
    """Every case in a group of its own, then in one of both processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    groups: list[Any] = [dist.new_group([0]), dist.new_group([1])]
    own, both = groups[rank], dist.group.WORLD
    found = {
        f"{case}-{dist.get_world_size(group)}": backward(Path(folder), rank, group, *how)
        for case, how in CASES.items()
        for group in (own, both)
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process, what it said in each case."""
    folder = tmp_path_factory.mktemp("ready_once")
    tiny.model(folder / "parts").save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (port, str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_ready_once(said: list[dict[str, str]], case: str, count: int) -> None:
    expected = "mark a variable ready only once" if case == "reentrant" else "passed"
    for process in said:
        assert expected in process[f"{case}-{count}"]

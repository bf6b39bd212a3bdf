"""Each ordinary launcher, by the command of the documentation: the run is that of one process.

What a launcher puts into the environment must not change what the YAML says: here they ask for bf16 and fp16,
and the runs compute in fp32.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmtune.run import read_run
from mmtune.training.loop import train
from tests.world import PENALTY, SCULPT, run_file, trained

ROOT = Path(__file__).parents[2]
TORCHRUN = "torchrun --nproc_per_node 2 --master_port PORT -m mmtune"
ACCELERATE = (
    "accelerate launch --num_processes 2 --num_machines 1 --dynamo_backend no --main_process_port PORT"
)
LAUNCHERS = {
    "zero1": TORCHRUN,
    "zero2": f"{ACCELERATE} --use_deepspeed --zero_stage 2 --mixed_precision bf16 -m mmtune",
    "ddp": f"{ACCELERATE} --multi_gpu --mixed_precision fp16 -m mmtune",
    "zero3": "deepspeed --num_gpus 2 --master_port PORT --no_local_rank --module mmtune",
}
CHANGES: dict[str, Any] = {
    "tune": {"language": {**SCULPT, "penalty": PENALTY}},
    "train": {"steps": 4, "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(read_run(run_file(world, tmp_path_factory.mktemp("alone"), **CHANGES)))


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_a_launched_run_is_that_of_one_process(engine: str, alone: Path, world: Path, tmp_path: Path) -> None:
    path = run_file(world, tmp_path, **CHANGES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [port if word == "PORT" else word for word in LAUNCHERS[engine].split()]
    command += ["train", str(path), f"train.engine={engine}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    one, two = trained(alone), trained(tmp_path / "run/final")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((tensor - two[name]).norm()) <= 1e-5 * float(tensor.norm()), name

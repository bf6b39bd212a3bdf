"""What ZeRO's shards say of values, moments, gradients and weights is what DeepSpeed's own getters say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tuning.zero_pieces import KINDS

ROOT = Path(__file__).parents[2]
COUNT = 3
LOOKED_AT = {
    "values before the first step", "moments before the first step", "shape", "frozen", "gradient", "hooks",
    "values", "exp_avg", "exp_avg_sq", "count", "wholes", "masked", "outside in the forward pass",
    "nothing inside", "outside after a step", "seen as", "seen again",
    "values after they were seen as others", "exp_avg loaded", "exp_avg_sq loaded", "step loaded",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={COUNT}"]
    command += [f"--master_port={port}", "-m", "tests.tuning.zero_pieces", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-9000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", range(COUNT))
def test_nothing_differs(folder: Path, kind: str, rank: int) -> None:
    found = json.loads((folder / f"{kind}.{rank}.found").read_text())
    assert {name: count for name, count in found.items() if count} == {}
    assert found.keys() >= LOOKED_AT
    assert ({"segment", "segments together"} <= found.keys()) == kind.startswith("zero3")

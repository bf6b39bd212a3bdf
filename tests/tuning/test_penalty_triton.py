"""The GPU's kernel: in Triton's interpreter, compiled for a GPU that is not there, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtune.tuning import penalty
from mmtune.tuning.penalty import retention_mask
from tests.tuning.test_penalty import assert_near, conflict_expected, drawn

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    """In a process of its own, since Triton chooses when it is imported."""
    file = Path(__file__).with_name("interpreted_penalty.py")
    asked = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        str(file),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        asked, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def of_three(x: Tensor, y: Tensor) -> Tensor:
    """x y as `bf16x3` makes it: hi hi + hi lo + lo hi, each product exact, sums in fp32."""
    halves = [(t.bfloat16().float(), (t - t.bfloat16().float()).bfloat16().float()) for t in (x, y)]
    (x_hi, x_lo), (y_hi, y_lo) = halves
    return x_lo @ y_hi + x_hi @ y_lo + x_hi @ y_hi


@pytest.mark.parametrize("rank", [8, 128])
def test_three_bf16_products_are_enough(rank: int) -> None:
    """The arithmetic of the tensor cores, imitated: 1e-5 of fp64 autograd, where one product is far off."""
    weight, a, b = drawn(512, 384, rank, dtype=torch.float32)
    expected = conflict_expected(weight, a, b)
    squared = retention_mask(weight).squared(slice(None))
    for times, near in ((of_three, 1e-5), (lambda x, y: x.bfloat16().float() @ y.bfloat16().float(), None)):
        g = squared * times(b, a)
        b_g, g_a = times(b.T, g), times(g, a.T)
        value = (b * g_a).sum().sqrt()
        if near:
            assert_near([value, b_g / value, g_a / value], expected, near)
        else:
            error = torch.linalg.vector_norm(g_a / value - expected[2])
            assert error > 1e-4 * torch.linalg.vector_norm(expected[2])


COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmtune.tuning import penalty_triton as ours
ranks, kind = int(sys.argv[1]), sys.argv[2]
types = {"float": tl.float32, "rows": tl.int8, "blocks": tl.uint8}
fixed = dict(KIND=kind, TYPE=types[kind], ROUNDED=tl.bfloat16, BLOCK=64, ALIGNED=True, PRECISION="bf16x3",
             Q=ours.COLUMNS, R=ranks, P=ours.strip(ranks))
names = "pointers numbers code a b g_a parts n p q r".split()
signature = dict.fromkeys(names, "*fp32") | {"pointers": "*i64"} | dict.fromkeys("npqr", "i32")
aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
source = ASTSource(ours._products, signature | dict.fromkeys(fixed, "constexpr"), fixed, aligned)
made = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=ours.options(ranks))
print(made.metadata.shared, "mma.sync" in made.asm["ptx"])
"""


@pytest.mark.parametrize(("ranks", "kind"), [(32, "blocks"), (64, "rows"), (128, "float")])
def test_compiles_for_a_4090(ranks: int, kind: str, tmp_path: Path) -> None:
    """No GPU is needed to compile for one: into tensor-core instructions, and into the memory it has."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(ranks), kind],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared, tensor_cores = done.stdout.split()
    assert int(shared) <= 99 * 1024
    assert tensor_cores == "True"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1000, 700, 8), (512, 4096, 32), (300, 333, 64), (640, 256, 128)], ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = [drawn(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    weights = [weight.to(dtype) for weight, _, _ in tensors]
    masks = [retention_mask(weight.cuda()) for weight in weights]
    pairs = [(a.cuda(), b.cuda()) for _, a, b in tensors]
    found = penalty.update_penalties(masks, pairs)
    again = penalty.update_penalties(masks, pairs)
    for weight, (_, a, b), mine, same in zip(weights, tensors, found, again, strict=True):
        assert_near([t.cpu() for t in mine], conflict_expected(weight, a, b), 1e-5)
        assert all(torch.equal(x, y) for x, y in zip(mine, same, strict=True))

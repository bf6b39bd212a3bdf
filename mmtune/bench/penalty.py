"""What the conflict penalty costs: `mmtune bench penalty`, ours against the plain form under autograd.

Each case runs in a process of its own, so that its memory is its own: what is extra is the peak of a call
(for ours with the making of the mask) above what the process held before it, the inputs, by the kernel's own
count (VmHWM of /proc/self/status after a reset; Linux only). A call on small matrices comes before it, since
code that is loaded counts too. Time is the processor time of one thread, the best of some
calls: a machine that does other work only adds to it. Errors are the largest, of value and gradients, of the
norm of the difference to fp64 autograd, relative to the norm there. W, A and B are such that bf16 holds them,
so all forms have the same problem; NF4 has a W of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmtune.core.versions import versions
from mmtune.tuning.penalty import retention_mask, update_penalties, update_penalty

SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096))
RANKS = (8, 16, 32, 64, 128)
FORMS = ("plain fp32", "plain bf16", "ours fp32", "ours bf16", "ours nf4")
QUICK = ((1024, 1024),), (8, 32), 3


def bench_penalty(
    sizes: Iterable[tuple[int, int]] = SIZES, ranks: Iterable[int] = RANKS, repeats: int = 5
) -> dict[str, Any]:
    """rows: for each shape of W, rank and form of computing: seconds, seconds_mask (to make the mask, once a
    run; ours only), extra_bytes (None where the system does not count it) and error.

    repeats: calls that are timed, of which the best counts.
    """
    rows = []
    # Imported before the processes are forked, not in each of them.
    forms = FORMS if find_spec("bitsandbytes") and import_module("bitsandbytes") else FORMS[:-1]
    for shape in sizes:
        for rank in ranks:
            inputs = drawn(*shape, rank)
            expected = plain(*(t.double() for t in inputs))
            for form in forms:
                made = _apart(form, inputs, expected, repeats)
                rows.append({"shape": list(shape), "rank": rank, "form": form, **made})
    result: dict[str, Any] = {"rows": rows, "machine": {"processor": processor(), "threads": 1}}
    if torch.cuda.is_available():
        result["gpu"] = [bench_gpu(32 * 3, (4096, 4096), rank) for rank in ranks]
    return {**result, "environment": versions()}


def drawn(p: int, q: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (p x q), A (r x q) and B (p x r), fp32, of the size that pretrained weights and adapters have."""
    generator = torch.Generator().manual_seed(p + q + rank)
    w, a, b = (torch.randn(s, generator=generator) for s in ((p, q), (rank, q), (p, rank)))
    return tuple((0.02 * t).bfloat16().float() for t in (w, a, b))  # type: ignore[return-value]


def plain(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N and its gradients for A and B as one would write it down: the formula, and autograd."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    mask = torch.tanh((1 / torch.log(weight.abs() / torch.linalg.vector_norm(weight) + 1e-15)).abs())
    value = torch.linalg.vector_norm(mask * (b @ a))
    return value.detach(), *torch.autograd.grad(value, (a, b))


def _apart(
    form: str, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], repeats: int
) -> dict[str, Any]:
    """`_measured` in a forked process, which shares the inputs."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, form, inputs, expected, repeats))
    process.start()
    there.close()
    try:
        made: dict[str, Any] | str = here.recv()
    except EOFError:
        made = f"the process that measured {form} ended with {process.exitcode}"
    process.join()
    if isinstance(made, str):
        raise RuntimeError(made)
    return made


def _send(to: Connection, *case: Any) -> None:
    try:
        to.send(_measured(*case))
    except Exception as error:  # told where it can be raised
        to.send(repr(error))


def _measured(
    form: str, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], repeats: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    _once(form, *_stored(form, *drawn(256, 256, len(inputs[1]))))
    weight, a, b = _stored(form, *inputs)
    if form == "ours nf4":
        made = import_module("bitsandbytes.functional").dequantize_4bit(weight.data, weight.quant_state)
        expected = plain(made.double(), a.double(), b.double())
        del made
    extra, found = _extra_memory(partial(_once, form, weight, a, b))
    errors = [
        (torch.linalg.vector_norm(mine.double() - theirs) / torch.linalg.vector_norm(theirs)).item()
        for mine, theirs in zip(found, expected, strict=True)
    ]
    ours = form.startswith("ours")
    call = partial(update_penalty, retention_mask(weight), a, b) if ours else partial(plain, weight, a, b)
    return {
        "seconds": best(call, repeats),
        "seconds_mask": best(partial(retention_mask, weight), repeats) if ours else None,
        "extra_bytes": extra,
        "error": max(errors),
    }


def _stored(form: str, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Any, Tensor, Tensor]:
    """W, A and B as a form takes them."""
    if form == "ours nf4":
        params = import_module("bitsandbytes.nn").Params4bit
        return params(weight, quant_type="nf4", requires_grad=False).to("cpu"), a, b
    if form == "plain bf16":
        return weight.bfloat16(), a.bfloat16(), b.bfloat16()
    return (weight.bfloat16() if form == "ours bf16" else weight), a, b


def _once(form: str, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a form computes, from nothing but its inputs."""
    if form.startswith("ours"):
        return update_penalty(retention_mask(weight), a, b)
    return plain(weight, a, b)


def best(call: Callable[[], object], repeats: int) -> float:
    """The least processor time of this thread that one of `repeats` calls takes, in seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.thread_time()
        call()
        seconds.append(time.thread_time() - began)
    return min(seconds)


def _extra_memory(call: Callable[[], tuple[Tensor, ...]]) -> tuple[int | None, tuple[Tensor, ...]]:
    """The peak of a call above what was held before it, in bytes, and what it returns.

    The least of three calls: a system that takes pages back in the meantime adds to the others.
    """
    extra = []
    for _ in range(3):
        try:
            ctypes.CDLL(None).malloc_trim(0)  # free memory that is kept would hide what the call takes
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _status("VmRSS")
        except (OSError, AttributeError):
            return None, call()
        made = call()
        extra.append(_status("VmHWM") - before)
    return min(extra), made


def _status(name: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def processor() -> str:
    """Its name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def bench_gpu(count: int, shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Milliseconds for `count` modules with bf16 W on this GPU, beside what the memory and the tensor cores
    need at the rates that a copy and a bf16 product reach here; share: of the larger of the two.

    An fp32 product counts as three in bf16, as which it is computed.
    """
    p, q = shape
    weights = [0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    masks = [retention_mask(weight) for weight in weights]
    pairs = [
        (0.02 * torch.randn(rank, q, device="cuda"), 0.02 * torch.randn(p, rank, device="cuda"))
        for _ in weights
    ]
    milliseconds = _gpu_milliseconds(lambda: update_penalties(masks, pairs))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bytes_per_ms = 2 * source.numel() / _gpu_milliseconds(lambda: target.copy_(source))
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flop_per_ms = 2 * 8192**3 / _gpu_milliseconds(lambda: square @ square)
    floors = count * p * q * 2 / bytes_per_ms, 3 * count * 6 * p * q * rank / flop_per_ms
    a, b = pairs[0]
    one_plain = _gpu_milliseconds(lambda: plain(weights[0].float(), a, b))
    return {
        "gpu": torch.cuda.get_device_name(),
        "modules": count,
        "shape": list(shape),
        "rank": rank,
        "milliseconds": milliseconds,
        "floor_memory_ms": floors[0],
        "floor_products_ms": floors[1],
        "share": max(floors) / milliseconds,
        "plain_fp32_ms": count * one_plain,
    }


def _gpu_milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """The median of some calls, after three that are not counted."""
    times = []
    for i in range(repeats + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(began.elapsed_time(ended))
    return sorted(times)[len(times) // 2]


def print_penalty(made: dict[str, Any], console: Console) -> None:
    """A line per shape and rank: time, memory and error of each form, ratios to the plain ones."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in made["rows"]:
        cases.setdefault((" x ".join(map(str, row["shape"])), row["rank"]), {})[row["form"]] = row
    forms = [form for form in FORMS if any(form in case for case in cases.values())]
    times = ("ours fp32 to plain fp32", "ours bf16 to plain fp32", "ours bf16 to plain bf16")
    machine = f"{made['machine']['processor']}, one thread"
    timed = _table(f"milliseconds of processor time, and how many times faster; {machine}", (*forms, *times))
    taken = _table("MiB beyond inputs, at the peak", forms)
    wrong = _table("largest relative error to fp64 autograd", forms)
    for (shape, rank), case in cases.items():
        ratios = [
            f"{case[other]['seconds'] / case[mine]['seconds']:.1f}"
            for mine, other in (pair.split(" to ") for pair in times)
        ]
        timed.add_row(shape, str(rank), *(f"{1e3 * case[f]['seconds']:.1f}" for f in forms), *ratios)
        extra = [case[form]["extra_bytes"] for form in forms]
        taken.add_row(shape, str(rank), *("?" if x is None else f"{x / 2**20:.1f}" for x in extra))
        wrong.add_row(shape, str(rank), *(f"{case[form]['error']:.0e}" for form in forms))
    for table in (timed, taken, wrong):
        console.print(table)
    for row in made.get("gpu", []):
        console.print(
            f"{row['gpu']}: {row['modules']} modules of {' x '.join(map(str, row['shape']))}, rank "
            f"{row['rank']}: {row['milliseconds']:.2f} ms, {100 * row['share']:.0f} % of the floor "
            f"(memory {row['floor_memory_ms']:.2f}, products {row['floor_products_ms']:.2f} ms); "
            f"plain fp32 {row['plain_fp32_ms']:.0f} ms"
        )


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("W", "rank", *headings):
        table.add_column(heading, justify="left" if heading == "W" else "right")
    table.columns[0].no_wrap = True
    return table

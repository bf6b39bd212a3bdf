"""How much memory a stage takes on each GPU: what lies there, engine by engine, and what the passes take.

What lies there is counted on the outline of the model with its tuners attached, to the byte; the passes are
rehearsed (training/rehearsal.py). Engines share bytes out as they do when they run: torch's DDP and FSDP2,
DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054). docs/memory.md explains each line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.spec import PARTS, ModelOptions, quantization
from mmtune.run import Stage, TrainOptions
from mmtune.training.fsdp import gathered
from mmtune.training.rehearsal import Passes, Shape, rehearse
from mmtune.training.zero_json import STAGES, zero_config
from mmtune.tuning.base import Tuner
from mmtune.tuning.joined import DriftPenalty, UpdatePenalty
from mmtune.tuning.penalty import MAGNITUDES, TABLE_FROM
from mmtune.tuning.sculpt import SculptTuner

GIB = 1 << 30
NAMES = {
    "single": "one GPU",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
# Allowances: for what torch's allocator does not know of, and for what it cannot use between its blocks.
CONTEXT = GIB // 2  # the CUDA context, cuBLAS
NCCL = GIB // 4
FRAGMENTS = 0.04  # of all else
# DeepSpeed's own, where its JSON does not say.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
}


@dataclass
class Column:
    """One way of running a stage: bytes on each GPU by line, and `working` beside the rehearsed passes."""

    engine: str
    quantize: str | None
    lines: dict[str, int]
    working: int

    @property
    def name(self) -> str:
        return NAMES[self.engine] + (f" {self.quantize}" if self.quantize else "")

    @property
    def allowance(self) -> int:
        return CONTEXT + (0 if self.engine == "single" else NCCL)

    def total(self, passes: Passes) -> int:
        """At the most at once, allowances among it."""
        used = sum(self.lines.values()) + passes.peak + self.working
        return used + self.allowance + round(FRAGMENTS * used)


@dataclass
class Estimate:
    """The memory of a stage. passes: of a micro-batch of `shape`, with activation checkpointing (True) and
    without.
    """

    columns: list[Column]
    passes: dict[bool, Passes]
    shape: Shape
    processes: int
    checkpointing: bool

    @property
    def own(self) -> Column:
        """The run as it is."""
        return self.columns[0]


def estimate(
    model: VisionLanguageModel,
    tuners: dict[str, Tuner],
    stage: Stage,
    options: ModelOptions,
    shape: Shape,
    processes: int,
) -> Estimate:
    """What a stage will take. model: its outline, with the tuners attached. shape: of a micro-batch."""
    kl, bf16 = stage.kl is not None, options.dtype == "bfloat16"
    passes = {on: rehearse(model, shape, bf16, on, kl) for on in (True, False)}
    columns = [
        Column(engine, kind, *_lines(model, tuners, stage, options, engine, kind, processes))
        for engine, kind in _ways(stage, quantization(options), processes)
    ]
    return Estimate(columns, passes, shape, processes, stage.train.activation_checkpointing)


def samples_at_once(settings: TrainOptions, processes: int) -> int:
    """The samples of a micro-batch."""
    even = math.ceil(settings.batch_size / processes)
    return min(settings.micro_batch_size or even, even)


def _ways(stage: Stage, quantize: str | None, processes: int) -> list[tuple[str, str | None]]:
    """Engines and how the language model is held: the run's own, and those to weigh it against."""
    own = stage.train.engine
    if processes == 1:
        ways = [("single", quantize), ("single", None), ("single", "nf4")]
    else:
        own = "ddp" if own == "single" else own
        split = [(engine, None) for engine in ("ddp", "zero2", "zero3", "fsdp2")]
        ways = [(own, quantize), *split, ("ddp", "nf4")]
    if stage.tune.language.tuner == "full":
        ways = [way for way in ways if way[1] is None]
    return list(dict.fromkeys(ways))


def _lines(
    model: VisionLanguageModel,
    tuners: dict[str, Tuner],
    stage: Stage,
    options: ModelOptions,
    engine: str,
    kind: str | None,
    processes: int,
) -> tuple[dict[str, int], int]:
    n = processes
    zero = STAGES.get(engine, 0)
    split = n if zero == 3 or engine == "fsdp2" else 1  # of weights
    shared = n if zero or engine == "fsdp2" else 1  # of what is updated
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    packed, working = _packed(model, kind)
    frozen += -sum(p.nbytes for p in _packable(model)) if kind else 0
    lines = {
        "frozen weights": _share(frozen, split) + packed + sum(b.nbytes for b in model.buffers()),
        "weights that train": _share(4 * trained, split),
        "gradients": _share(4 * trained, n if zero >= 2 or engine == "fsdp2" else 1),
        "Adam's moments": _share(8 * trained, shared),
        "masks, penalties, W0": _states(model, tuners, stage, split, n, engine),
        "the engine's buffers": _buffers(model, trained, stage, options, engine, n),
    }
    if zero:
        lines["weights that train"] += _share(4 * trained, n)  # the masters
    if zero == 1:
        lines["gradients"] += _share(4 * trained, n)
    return lines, working


def _share(size: int, count: int) -> int:
    return -(-size // count)


# ---- Weights in 4 or 8 bits --------------------------------------------------------------------------------


def _packable(model: VisionLanguageModel) -> list[torch.Tensor]:
    """The weights that bitsandbytes would hold: of the language model's linear layers but the head."""
    hf = model.language.hf
    head = hf.get_output_embeddings()
    return [
        module.weight
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    ]


def _packed(model: VisionLanguageModel, kind: str | None) -> tuple[int, int]:
    """What these take, and what the largest takes while it is unpacked for a product."""
    if kind is None:
        return 0, 0
    weights = _packable(model)
    return sum(packed_bytes(w.shape[0], w.shape[1], kind) for w in weights), max(w.nbytes for w in weights)


def packed_bytes(rows: int, columns: int, kind: str) -> int:
    """Of a weight in bitsandbytes' int8, with a scale per row; or nf4 in blocks of 64, whose scales are in 8
    bits, with a scale per 256 of them, the two codes, and an offset.
    """
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // 64)
    return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256) + 4 * (256 + 16 + 1)


# ---- What tuners and engines keep --------------------------------------------------------------------------


def _states(
    model: VisionLanguageModel, tuners: dict[str, Tuner], stage: Stage, split: int, n: int, engine: str
) -> int:
    """Masks, what penalties keep, and the gradients that they have ready during a step's last passes."""
    total = 0
    for tuner in tuners.values():
        if isinstance(tuner, SculptTuner):
            entries = sum(p.numel() for name in tuner.layers for p in tuner.pair(name))
            kept = 4 * entries if tuner.options.support in ("movement", "gradient") else 0
            total += max(entries, kept if engine in ("single", "ddp") else _share(kept, n))
        penalty = tuner.weight_penalty
        if penalty:
            total += sum(one.score.nbytes for one in penalty.measured.values())
        if isinstance(penalty, UpdatePenalty):
            entries = sum(p.numel() for p in penalty.parameters())
            plain = penalty.options.kind in ("conflict", "activation")
            tables = [
                w for w in penalty.frozen().values() if w.element_size() == 2 and w.numel() > TABLE_FROM
            ]
            total += _share(4 * entries, 1 if engine == "zero3" else n)
            total += _share(4 * MAGNITUDES * len(tables), 1 if split > 1 else n) if plain else 0
        if isinstance(penalty, DriftPenalty):  # W0, M^2 and the gradients
            total += 3 * sum(w.nbytes for w in penalty.initial.values())
    if stage.kl or stage.train.probe:  # the teacher's copies
        total += sum(
            p.nbytes
            for part in PARTS
            if part not in model.adapters
            for p in model.part(part).parameters()
            if p.requires_grad
        )
    return total


def _buffers(
    model: VisionLanguageModel, trained: int, stage: Stage, options: ModelOptions, engine: str, n: int
) -> int:
    """What an engine sends from and gathers into."""
    if engine == "single":
        return 0
    if engine == "ddp":  # its buckets hold every gradient once more
        return 4 * trained
    if engine == "fsdp2":  # the layer that runs and the next, and all that is in no layer
        groups = [sum(p.nbytes for p in module.parameters()) for module in gathered(model)]
        rest = sum(p.nbytes for p in model.parameters()) - sum(groups)
        return rest + sum(sorted(groups)[-2:])
    own = stage.train.deepspeed if engine == stage.train.engine else None
    settings = replace(stage.train, engine=engine, deepspeed=own)  # type: ignore[arg-type]
    found = {**ZERO_DEFAULTS, **zero_config(settings, options.dtype, n)["zero_optimization"]}
    bucket = 4 * int(found["reduce_bucket_size"])
    if engine != "zero3":
        return 2 * bucket if found.get("overlap_comm") else bucket  # one fills while the other is sent
    whole, most = 0, int(found["stage3_max_live_parameters"]) + int(found["stage3_prefetch_bucket_size"])
    for parameter in model.parameters():
        if parameter.numel() <= found["stage3_param_persistence_threshold"]:
            whole += parameter.nbytes
    entries = sum(p.numel() for p in model.parameters())
    return bucket + whole + min(entries, most) * torch_dtype(options.dtype).itemsize


# ---- What is printed ---------------------------------------------------------------------------------------


def print_estimate(made: Estimate, dtype: str, limit: float, tokens_from: str, console: Console) -> None:
    """The table, and which ways fit. limit: GiB of a GPU. tokens_from: where a sample's tokens are from."""
    shape = made.shape
    table = Table(title="Memory per GPU in GiB", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for column in made.columns:
        table.add_column(column.name, justify="right")
    for line in made.columns[0].lines:
        table.add_row(line, *(_gib(column.lines[line]) for column in made.columns))
    table.add_row("CUDA and NCCL, allowed for", *(_gib(column.allowance) for column in made.columns))
    for checkpointing, passes in made.passes.items():
        table.add_section()
        table.add_row(
            "activations, checkpointed" if checkpointing else "activations, all kept",
            *[_gib(passes.kept)] * len(made.columns),
        )
        more = [passes.peak - passes.kept + column.working for column in made.columns]
        table.add_row("more while passes run", *map(_gib, more))
        totals = [column.total(passes) for column in made.columns]
        table.add_row(f"total, with {FRAGMENTS:.0%} for gaps", *map(_gib, totals), style="bold")
        table.add_row(f"fits {limit:g} GiB", *("yes" if t <= limit * GIB else "NO" for t in totals))
    console.print(table)
    processes = "one process" if made.processes == 1 else f"{made.processes} processes"
    samples = "1 sample" if shape.samples == 1 else f"{shape.samples} samples"
    pictures = "1 picture" if shape.pictures == 1 else f"{shape.pictures} pictures"
    console.print(
        f"For {processes} in {dtype}, each with {samples} of {shape.tokens:,} tokens ({tokens_from}) and "
        f"{pictures} at once; the loss is taken on up to {shape.supervised:,} tokens of a sample.",
        soft_wrap=True,
    )
    own = made.own
    needed = own.total(made.passes[made.checkpointing])
    kept = "checkpointed" if made.checkpointing else "all activations kept"
    verdict = "fits" if needed <= limit * GIB else "does not fit"
    console.print(
        f"This run, {own.name}, {kept}: {_gib(needed)} GiB, {verdict}.", style="bold", soft_wrap=True
    )
    if needed > limit * GIB:
        console.print(_what_fits(made, limit), soft_wrap=True)


def _what_fits(made: Estimate, limit: float) -> str:
    found = [
        f"{column.name}, {'checkpointed' if on else 'all activations kept'}"
        for on, passes in made.passes.items()
        for column in made.columns
        if column.total(passes) <= limit * GIB
    ]
    smaller = (
        " A smaller train.micro_batch_size takes less for activations." if made.shape.samples > 1 else ""
    )
    return (f"What does: {'; '.join(found)}." if found else "Nothing in the table does.") + smaller


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"

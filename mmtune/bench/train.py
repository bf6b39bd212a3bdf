"""What a tuner adds to a training step: the whole optimiser step of a random Llama-shaped model.

Every tuner gets the same frozen weights, the same batches, the project's own engine and tuners; what is timed
is forward, backward, penalty, clipping and the optimiser. Loading data, logging and checkpoints are not.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.errors import UserError
from mmtune.core.files import shipped
from mmtune.core.versions import versions
from mmtune.data.batches import Batch
from mmtune.data.chat import IGNORE, IMAGE_ID
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import PARTS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.run import TrainOptions
from mmtune.training.engine import Engine, make_engine
from mmtune.training.optim import make_optimizer
from mmtune.tuning.base import PenaltyOptions, Tuner
from mmtune.tuning.frozen import FrozenTuner
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from mmtune.tuning.sculpt import SculptOptions

TUNED = ("lora", "lorasculpt")
TOKENIZER = "data/tiny/model/language"
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
WARM_UP = 2  # steps before any is timed
# Dense bf16 products with fp32 sums, FLOP/s, of the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165.2e12}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class BenchOptions:
    """The model and its steps. tokens: of an optimiser step, in rows of `length`, `rows` in a forward pass.

    targets, penalised: patterns of the language model's layers, as in a run's YAML. steps: timed of each
    tuner before the prune, and again after it.
    """

    tuners: list[str] = field(default_factory=lambda: list(TUNED))
    width: int = 512
    layers: int = 4
    tokens: int = 8192
    length: int = 512
    rows: int = 4
    rank: int = 32
    density: float = 0.1
    targets: str | list[str] = "all-linear"
    penalised: list[str] | None = None
    dtype: str = "float32"
    activation_checkpointing: bool = False
    steps: int = 10

    def check(self) -> None:
        """Raises UserError where the numbers don't fit together."""
        unknown = [name for name in self.tuners if name not in TUNED]
        if unknown or len(set(self.tuners)) < len(self.tuners):
            what = f"'{unknown[0]}' is none of them" if unknown else "one is given twice"
            raise UserError(what, where="--tuners", mend=f"Known: {', '.join(TUNED)}.")
        if self.width % 128:
            raise UserError(f"{self.width} is no multiple of 128", where="--width", mend="As Llama's heads.")
        if self.tokens % (self.length * self.rows):
            raise UserError(
                f"{self.tokens} tokens are no multiple of {self.rows} rows of {self.length}", where="--tokens"
            )


def bench_train(options: BenchOptions) -> dict[str, Any]:
    """Seconds per step of each tuner, before and after the prune, in turns so that noise meets all alike.

    `ratio` is the median over rounds of a step's time to that of the first tuner in the same round: of the
    processor's time on a CPU, which suffers less from what else the machine does, and by the clock on a GPU.
    `tuners_share`: of the processor's time, what is spent in the tuners' own calls, without what their hooks
    add to the backward pass; it is hardly touched by noise, and None on a GPU. Raises UserError.
    """
    options.check()
    torch.manual_seed(0)
    first = _Run(options, options.tuners[0], None)
    runs = [first] + [_Run(options, name, first.base) for name in options.tuners[1:]]
    rounds: dict[str, list[list[_Step]]] = {}
    for phase in ("before the prune", "after the prune"):
        for _ in range(WARM_UP if phase == "before the prune" else 1):
            for run in runs:
                run.step()
        rounds[phase] = [[run.step() for run in runs] for _ in range(options.steps)]
        if phase == "before the prune":
            prunes = [run.step() for run in runs]
    device = runs[0].engine.device
    made = {
        "options": vars(options),
        "parameters": first.parameters,
        "tuners": {
            run.name: {
                **{phase: _figures(made, number, device) for phase, made in rounds.items()},
                "step of the prune": prunes[number].seconds,
            }
            for number, run in enumerate(runs)
        },
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
        },
        "environment": versions(),
    }
    flop, peak = step_flop(options, first.parameters), _peak(made["machine"]["device"])
    for name in options.tuners:
        for phase in rounds:
            row = made["tuners"][name][phase]
            row["tokens_per_s"] = options.tokens / row["seconds"]
            row["samples_per_s"] = options.tokens / options.length / row["seconds"]
            known = peak is not None and options.dtype == "bfloat16"
            row["mfu"] = flop / row["seconds"] / peak if known and peak else None
    for run in runs:
        run.engine.close()
    return made


def step_flop(options: BenchOptions, parameters: int) -> float:
    """Floating-point operations that a step of the frozen language model needs, the tuner's own left out.

    parameters: of its linear layers. Each token needs 2 per weight forward and 2 backward (gradients of
    activations; frozen weights need none), and causal attention 2 x 2 x width per layer and token before it,
    once forward and twice backward. What activation checkpointing repeats does not count.
    """
    attention = 3 * 2 * 2 * options.width * options.layers * options.length / 2
    return options.tokens * (4 * parameters + attention)


@dataclass(frozen=True)
class _Step:
    seconds: float
    processor_seconds: float
    tuners_seconds: float
    peak_bytes: int | None


class _Run:
    """One tuner on its own copy of what trains, and on the same frozen weights as the others."""

    def __init__(self, options: BenchOptions, name: str, base: VisionLanguageModel | None) -> None:
        self.name = name
        batch_size = options.tokens // options.length
        settings = TrainOptions(
            batch_size=batch_size,
            micro_batch_size=options.rows,
            steps=1,
            activation_checkpointing=options.activation_checkpointing,
        )
        self.engine: Engine = make_engine(settings, options.dtype)
        self.base = base or _random_model(options, self.engine.device)
        self.model = _beside(self.base)
        core = self.model.core("language")
        linear = [m for m in core.modules() if isinstance(m, torch.nn.Linear)]
        self.parameters = (
            sum(m.weight.numel() for m in linear) - self.model.language.hf.lm_head.weight.numel()
        )
        self.tuners: dict[str, Tuner] = {"vision": FrozenTuner(), **_tuners(options, name)}
        rows = [row for part in PARTS for row in self.tuners[part].attach(self.model, part)]
        if options.activation_checkpointing:
            self.model.language.checkpoint_activations()
        for tuner in self.tuners.values():
            tuner.start(_prune_step(options) + options.steps + 1, seed=0)
        rates = {row.part: row.lr for row in rows if row.lr is not None}
        self.engine.prepare(self.model, make_optimizer(self.model, rates, 0.0))
        for tuner in self.tuners.values():
            tuner.bind(self.engine.shards)
        self.model.train()
        self.batches = [
            _random_batch(self.model, options, seed).to(self.engine.device)
            for seed in range(batch_size // options.rows)
        ]
        self.supervised = batch_size * (options.length // 4)
        self.done = 0

    def step(self) -> _Step:
        """One optimiser step, timed."""
        engine = self.engine
        _reset_peak(engine.device)
        began, used = time.perf_counter(), time.process_time()
        inside = 0.0
        for number, batch in enumerate(self.batches, start=1):
            last = number == len(self.batches)
            if last:
                inside += self._ask("before_backward")
            engine.backward(engine.model(batch) / self.supervised * engine.count, last)
        inside += self._ask("after_backward")
        engine.step()
        self.done += 1
        inside += self._ask("after_step", self.done)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - began, time.process_time() - used
        return _Step(seconds, processor, inside, _peak_bytes(engine.device))

    def _ask(self, what: str, *arguments: int) -> float:
        """Calls one method of every tuner; the processor's seconds it took."""
        used = time.process_time()
        for tuner in self.tuners.values():
            getattr(tuner, what)(*arguments)
        return time.process_time() - used


def _prune_step(options: BenchOptions) -> int:
    return WARM_UP + options.steps + 1


def _tuners(options: BenchOptions, name: str) -> dict[str, Tuner]:
    """The connector trains in full; with lorasculpt both it and the language model are penalised."""
    shared: dict[str, Any] = {"lr": 2e-4, "rank": options.rank, "alpha": 2 * options.rank}
    shared["targets"] = options.targets
    if name == "lora":
        return {"connector": FullOptions(lr=2e-5).make(), "language": LoraOptions(**shared).make()}
    sculpt = SculptOptions(
        **shared,
        density=options.density,
        prune_at=_prune_step(options),
        penalty=PenaltyOptions(weight=1.0, modules=options.penalised or "pruned"),
    )
    return {
        "connector": FullOptions(lr=2e-5, penalty=PenaltyOptions(weight=1.0)).make(),
        "language": sculpt.make(),
    }


def _random_model(options: BenchOptions, device: torch.device) -> VisionLanguageModel:
    """Of Llama's proportions, with the tiny tokenizer's vocabulary: a head that costs next to nothing, so
    that a tuner's share of the step is not made to look small. The vision tower is as small.
    """
    language = {
        "model_type": "llama",
        "hidden_size": options.width,
        "intermediate_size": options.width * 43 // 16,  # 11008 at 4096
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 128,
        "num_key_value_heads": options.width // 128,
        "max_position_embeddings": options.length,
    }
    with device:
        return assemble(
            ModelOptions(
                vision=VisionOptions("clip", config=TOWER, layer=-1),
                connector=ConnectorOptions("mlp2x_gelu"),
                language=LanguageOptions(config=language, tokenizer=str(shipped(TOKENIZER))),
                dtype=options.dtype,  # type: ignore[arg-type]
            ),
            exact=["connector"],
        ).to(device)


def _beside(base: VisionLanguageModel) -> VisionLanguageModel:
    """A copy to tune, whose language model and tower, which stay frozen, are not held twice."""
    frozen = [p for part in ("vision", "language") for p in base.part(part).parameters()]
    return copy.deepcopy(base, {id(parameter): parameter for parameter in frozen})


def _random_batch(model: VisionLanguageModel, options: BenchOptions, seed: int) -> Batch:
    """Rows of a picture and random tokens, the last quarter of each supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 300, (options.rows, options.length), generator=draw)
    ids[:, 1 : 1 + model.image_tokens] = IMAGE_ID
    labels = ids.clone()
    labels[:, : options.length - options.length // 4] = IGNORE
    side = model.transform.size
    images = torch.randint(0, 256, (options.rows, 3, side, side), dtype=torch.uint8, generator=draw)
    return Batch(ids, torch.ones_like(ids), images, labels)


def _figures(rounds: Sequence[Sequence[_Step]], number: int, device: torch.device) -> dict[str, Any]:
    clock = "seconds" if device.type == "cuda" else "processor_seconds"
    mine = [steps[number] for steps in rounds]
    ratios = [getattr(steps[number], clock) / getattr(steps[0], clock) for steps in rounds]
    peaks = [step.peak_bytes for step in mine if step.peak_bytes is not None]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "seconds": statistics.median(step.seconds for step in mine),
        "processor_seconds": statistics.median(step.processor_seconds for step in mine),
        # On a GPU the work only begins in them, so their time says nothing.
        "tuners_share": None
        if device.type == "cuda"
        else statistics.median(step.tuners_seconds / step.processor_seconds for step in mine),
        "ratio": statistics.median(ratios),
        "ratio_quarters": [quarters[0], quarters[2]],
        "peak_bytes": max(peaks) if peaks else None,
    }


def _peak(device: str) -> float | None:
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "CPU"


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        with suppress(OSError):
            CLEAR.write_text("5")  # Linux: the peak of resident memory starts anew


def _peak_bytes(device: torch.device) -> int | None:
    """The most memory in use since `_reset_peak`, of the whole process: all tuners' adapters lie in it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if not STATUS.is_file():
        return None
    lines = [line.split() for line in STATUS.read_text().splitlines()]
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:"), None)


def print_train(made: dict[str, Any], console: Console) -> None:
    """A line per tuner and phase."""
    asked, machine = made["options"], made["machine"]
    title = (
        f"{asked['layers']} x {asked['width']}, rank {asked['rank']}, {asked['tokens']:,} tokens a step, "
        f"{asked['dtype']}, {machine['device']}, {machine['threads']} threads"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = (
        "s/step",
        "CPU s",
        "ratio",
        "quarters",
        "in tuners",
        "samples/s",
        "tokens/s",
        "MFU",
        "peak MiB",
    )
    table.add_column("tuner", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for phase in ("before the prune", "after the prune"):
        table.add_section()
        for name, rows in made["tuners"].items():
            row = rows[phase]
            table.add_row(
                f"{name}, {phase.split()[0]}",
                f"{row['seconds']:.3f}",
                f"{row['processor_seconds']:.3f}",
                f"{row['ratio']:.3f}",
                "-".join(f"{quarter:.2f}" for quarter in row["ratio_quarters"]),
                "-" if row["tuners_share"] is None else f"{100 * row['tuners_share']:.2f} %",
                f"{row['samples_per_s']:.1f}",
                f"{row['tokens_per_s']:,.0f}",
                "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
            )
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    console.print(table)
    prunes = ", ".join(f"{name} {rows['step of the prune']:.3f} s" for name, rows in made["tuners"].items())
    console.print(
        f"Before and after the prune; ratio: the median over rounds, to {asked['tuners'][0]}; in tuners: "
        f"the share of the processor's time spent in their own calls. The step in which it prunes, by "
        f"the clock: {prunes}."
    )

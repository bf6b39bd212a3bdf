"""The training loop, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, remove_partials, write_json
from mmtune.core.versions import commit, versions
from mmtune.data.batches import Batch, collate_or_error
from mmtune.data.chat import IGNORE
from mmtune.parts.fingerprint import start_hash
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import PARTS, ModelOptions
from mmtune.run import RunOptions, Stage, config_hash, data_hash
from mmtune.training.checkpoint import (
    cut_metrics,
    load_checkpoint,
    newest,
    prune_old,
    save_checkpoint,
    save_model,
)
from mmtune.training.folder import check_origin, done_folders, open_run
from mmtune.training.meter import Meter
from mmtune.training.optim import make_optimizer, schedule_factor, set_rates
from mmtune.training.plan import make_plan, print_tuning_table, read_examples, read_replay
from mmtune.training.signals import Signals, leave_to_parent
from mmtune.tuning.base import Tuner
from mmtune.tuning.kl import Teacher

MOST_IDS = 32  # named in one message


def train(options: RunOptions, resume: bool = False, signals: Signals | None = None) -> Path:
    """Runs every stage and returns the folder of the final model.

    Each stage ends as a model folder from which the next one starts. signals: those that end the run after
    the step they come in, with a checkpoint; by default none is caught. Raises UserError where the run's
    folder already holds a run and `resume` is not given, or holds another run than this one; where a loss,
    a gradient or a weight is no number; and where something cannot be written. Raises Interrupted.
    """
    open_run(options, resume)
    remove_partials(options.folder)
    signals = signals or Signals()
    base: ModelOptions = options.model
    first_step = 0
    folders = done_folders(options)
    for number, (stage, done) in enumerate(zip(options.all_stages(), folders, strict=True), start=1):
        if (done / "trained.json").is_file():
            first_step = read_json(done / "trained.json")["step"]
        else:
            first_step = _train_stage(options, number, stage, base, first_step, done, signals)
        base = ModelOptions(base=str(done), dtype=options.model.dtype, attention=options.model.attention)
    return folders[-1]


def _train_stage(
    options: RunOptions,
    number: int,
    stage: Stage,
    base: ModelOptions,
    first_step: int,
    done: Path,
    signals: Signals,
) -> int:
    folder, settings = options.folder, stage.train
    set_seed(options.seed)
    AcceleratorState._reset_state()  # of another run in this process, whose precision it would insist on
    accelerator = Accelerator(
        mixed_precision="bf16" if options.model.dtype == "bfloat16" else "no",
        # Said here, or an environment variable would have the last word and scale the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    tuners = {part: getattr(stage.tune, part).make() for part in PARTS}
    exact = [part for part, tuner in tuners.items() if tuner.exact]
    if accelerator.num_processes > 1:
        raise UserError(
            f"{accelerator.num_processes} processes were started, but engine 'single' is one process",
            mend="Start mmtune without torchrun or accelerate launch.",
        )
    # Moved before anything is attached: what a tuner keeps beside the weights lies where they lie.
    model = assemble(base, exact).to(accelerator.device)
    rates = _attach(model, tuners, folder, number)
    teacher = Teacher(model) if stage.kl else None
    if settings.activation_checkpointing:
        for part in (model.vision, model.language):
            part.hf.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[union-attr,operator]

    examples = read_examples(model.chat, stage.data, settings)
    pool, replayed = read_replay(model.chat, stage, len(examples), options.seed)
    plan = make_plan(examples, settings, options.seed, pool, replayed)
    steps = len(plan)
    for tuner in tuners.values():
        tuner.start(steps, options.seed)

    optimizer = make_optimizer(model, rates, settings.weight_decay)
    state: dict[str, Any] = {
        "stage": number,
        "config": config_hash(options),
        "data": data_hash(stage.all_data),
        "base": start_hash(options.model),
        "versions": versions(),
        "commit": commit(),
    }
    start = 0
    checkpoints = folder / "checkpoints"
    found = newest(checkpoints, number)
    if found is not None:
        saved = load_checkpoint(found, model, optimizer, tuners)
        check_origin(options, state["data"], saved, found)
        start = saved["stage_step"]
    cut_metrics(folder / "metrics.jsonl", first_step + start)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    # The loader runs ahead of the steps; the plan says which samples make up which step.
    loader: DataLoader[Batch | UserError] = DataLoader(
        examples + pool,  # type: ignore[arg-type]
        batch_sampler=[micro for step in plan[start:] for micro in step],
        collate_fn=partial(collate_or_error, transform=model.transform, pad_id=model.language.pad_id),
        num_workers=settings.workers,
        worker_init_fn=leave_to_parent,
        # Its own: from the global one a resumed run would draw a seed that the first run did not.
        generator=torch.Generator(),
    )
    batches: Iterator[Any] = map(_whole, loader)
    label = (
        options.name
        if len(options.all_stages()) == 1
        else f"{options.name}, {stage.name or f'stage {number}'}"
    )
    with Meter(folder / "metrics.jsonl", label, start, steps) as meter:
        signals.hold()
        for step in range(start, steps):
            micros = [next(batches).to(accelerator.device) for _ in plan[step]]
            supervised = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in micros)
            log = step == 0 or (step + 1) % settings.log_every == 0 or step + 1 == steps
            step_number = first_step + step + 1
            line: dict[str, Any] = {"step": step_number, "stage": number}
            set_rates(optimizer, schedule_factor(settings.schedule, step, steps, settings.warmup))
            line |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}

            task_loss = kl_value = 0.0
            penalty_gradients: dict[torch.Tensor, torch.Tensor] = {}
            for i, micro in enumerate(micros):
                # Weighted by supervised tokens: the step's loss is their mean, however it is split.
                if teacher and stage.kl:
                    loss, kl = (value / supervised for value in teacher.losses(wrapped, micro))
                    task_loss += loss.item()
                    kl_value += kl.item()
                    loss = loss + stage.kl.weight * kl
                else:
                    loss = wrapped(micro) / supervised
                    task_loss += loss.item()
                _stop_if_not_finite("loss", task_loss, step_number, [micro], checkpoints)
                _stop_if_not_finite("KL to the base", kl_value, step_number, [micro], checkpoints)
                if i == len(micros) - 1:  # penalties count once per optimiser step
                    penalties = {
                        part: p for part, tuner in tuners.items() if (p := tuner.penalty()) is not None
                    }
                    for name, penalty in penalties.items():
                        named = f"penalty on the {name}"
                        _stop_if_not_finite(named, penalty.item(), step_number, micros, checkpoints)
                    if penalties and log:
                        line |= {f"penalty_{part}": penalty.item() for part, penalty in penalties.items()}
                        penalty_gradients = _gradients(torch.stack(list(penalties.values())).sum(), model)
                    for penalty in penalties.values():
                        loss = loss + penalty
                accelerator.backward(loss)
            if teacher:
                line["kl"] = kl_value
            if penalty_gradients:
                of_task = [p.grad - g for p, g in penalty_gradients.items() if p.grad is not None]
                line |= {
                    "penalty_grad_norm": _norm(penalty_gradients.values()),
                    "task_grad_norm": _norm(of_task),
                }
            line["grad_norm"] = float(accelerator.clip_grad_norm_(model.parameters(), settings.clip))
            _stop_if_not_finite("gradient's norm", line["grad_norm"], step_number, micros, checkpoints)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for tuner in tuners.values():
                tuner.after_step(step + 1, optimizer)

            positions = sum(int(micro.attention_mask.sum()) for micro in micros)
            meter.step(step + 1, task_loss, sum(map(len, plan[step])), positions)
            if log:
                densities = {
                    name: value for tuner in tuners.values() for name, value in tuner.densities().items()
                }
                meter.log({**line, "loss": task_loss, **densities})
            stopping = signals.waiting is not None
            if step + 1 < steps and (stopping or (step + 1) % settings.checkpoint.every == 0):
                _stop_if_weights_not_finite(model, step_number, micros, checkpoints)
                now = {**state, "step": step_number, "stage_step": step + 1}
                save_checkpoint(checkpoints / f"step-{step_number}", model, optimizer, tuners, now)
                prune_old(checkpoints, settings.checkpoint.keep)
                if stopping:
                    signals.stop(f"after step {step_number}, with a checkpoint")
    for tuner in tuners.values():
        tuner.finish()
    _stop_if_weights_not_finite(model, first_step + steps, [], checkpoints)
    trained = {**state, "step": first_step + steps, "name": options.name, "seed": options.seed}
    save_model(model, done, trained)
    signals.release()
    accelerator.free_memory()
    return first_step + steps


def _attach(
    model: VisionLanguageModel, tuners: dict[str, Tuner], folder: Path, number: int
) -> dict[str, float]:
    """Attaches the tuners, saves and prints the tuning table, and returns each trained part's rate."""
    rows = [row for part, tuner in tuners.items() for row in tuner.attach(model, part)]
    rates = {row.part: row.lr for row in rows if row.lr is not None}
    table = folder / "tuning_table.json"
    before = [row for row in read_json(table) if row["stage"] < number] if table.is_file() else []
    write_json(table, before + [{"stage": number, **row.to_dict()} for row in rows])
    print_tuning_table(rows)
    return rates


def _whole(made: Batch | UserError) -> Batch:
    """A batch from the loader; what went wrong in a worker is raised here."""
    if isinstance(made, UserError):
        raise made
    return made


def _gradients(value: torch.Tensor, model: VisionLanguageModel) -> dict[torch.Tensor, torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().pow(2).sum()) for tensor in tensors))


def _stop_if_not_finite(name: str, value: float, step: int, micros: list[Batch], checkpoints: Path) -> None:
    if not math.isfinite(value):
        raise _not_finite(f"the {name} is {value} at step {step}", micros, checkpoints)


def _stop_if_weights_not_finite(
    model: VisionLanguageModel, step: int, micros: list[Batch], checkpoints: Path
) -> None:
    """Before they are saved, so that the checkpoint before stays the last one."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        named = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
        raise _not_finite(
            f"{len(broken)} weights are not finite after step {step}: {named}", micros, checkpoints
        )


def _not_finite(what: str, micros: list[Batch], checkpoints: Path) -> UserError:
    ids = [name for micro in micros for name in micro.sample_ids]
    more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
    samples = f"; the samples were {', '.join(ids[:MOST_IDS])}{more}" if ids else ""
    last = newest(checkpoints)
    return UserError(
        what + samples,
        mend="With --resume it would come to the same. Lower the learning rate, under another name, or look "
        f"at these samples. {f'The last good checkpoint is {last}.' if last else 'There is no checkpoint.'}",
    )

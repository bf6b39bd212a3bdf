"""The training loop, top to bottom."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, remove_partials, write_json
from mmtune.core.processes import said_once, tell, wait
from mmtune.core.versions import commit, versions
from mmtune.data.batches import Batch, Example, collate, collate_or_error
from mmtune.evaluation.restore import QUANTIZED_BASE
from mmtune.parts.attention import say_attention
from mmtune.parts.fingerprint import start_hash
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel, assemble, write_quantized
from mmtune.parts.proof import require_plain
from mmtune.parts.spec import PARTS, ModelOptions
from mmtune.run import RunOptions, Stage, config_hash, data_hash
from mmtune.training.checkpoint import (
    cut_metrics,
    load_progress,
    load_weights,
    newest,
    prune_old,
    save_checkpoint,
    save_model,
)
from mmtune.training.engine import check_engine, make_engine, open_processes
from mmtune.training.folder import check_origin, done_folders, open_run
from mmtune.training.meter import Meter
from mmtune.training.optim import check_rates, make_optimizer, schedule_factor, seed_of, set_rates
from mmtune.training.plan import (
    count_supervised,
    idle_example,
    make_plan,
    print_tuning_table,
    read_examples,
    read_replay,
    say_contrasts,
    shared,
)
from mmtune.training.probe import Probe, spread
from mmtune.training.signals import Signals, leave_to_parent
from mmtune.tuning.base import Tuner
from mmtune.tuning.importance import chosen, measure
from mmtune.tuning.kl import Teacher
from mmtune.tuning.shards import Shards

MOST_IDS = 32  # named in one message
SAID = {
    "loss": "the loss",
    "kl": "the KL to the base",
    **{f"penalty_{part}": f"the penalty on the {part}" for part in PARTS},
}


def train(options: RunOptions, resume: bool = False, signals: Signals | None = None) -> Path:
    """Runs every stage and returns the folder of the final model.

    Each stage ends as a model folder from which the next one starts. signals: those that end the run after
    the step they come in, with a checkpoint; by default none is caught. Raises UserError where the run's
    folder already holds a run and `resume` is not given, or holds another run than this one; where a loss,
    a gradient or a weight is no number; where something cannot be written; and where the processes that were
    started are not what the engine asks for. Raises Interrupted.
    """
    with said_once():
        for stage in options.all_stages():
            check_engine(stage.train)
    if open_processes() == 0:
        open_run(options, resume)
        remove_partials(options.folder)
        if options.model.base and options.model.quantize:
            write_quantized(options.model.base, options.model.quantize, options.folder / QUANTIZED_BASE)
    wait()
    signals = signals or Signals()
    base: ModelOptions = options.model
    first_step = 0
    folders = done_folders(options)
    for number, (stage, done) in enumerate(zip(options.all_stages(), folders, strict=True), start=1):
        if (done / "trained.json").is_file():
            first_step = read_json(done / "trained.json")["step"]
        else:
            first_step = _train_stage(options, number, stage, base, first_step, done, signals)
            gc.collect()  # a model and what hooks into its gradients hold each other, and the next one comes
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
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
    engine = make_engine(settings, options.model.dtype)
    set_seed(options.seed)  # the same on every process: what is new in a model starts alike on all
    tuners = {part: getattr(stage.tune, part).make() for part in PARTS}
    exact = [part for part, tuner in tuners.items() if tuner.exact]
    # Moved before anything is attached: what a tuner keeps beside the weights lies where they lie.
    model = assemble(base, exact).to(engine.device)
    require_plain(model.language)
    rates = _attach(model, tuners, folder, number, engine.rank == 0)
    tell(say_attention(model.attention))
    teacher = Teacher(model) if stage.kl or settings.probe else None
    if settings.activation_checkpointing:
        model.vision.checkpoint_activations()
        model.language.checkpoint_activations()

    chat = model.chat.in_format(stage.chat)
    examples = read_examples(chat, stage.data, settings)
    pool, replayed = read_replay(chat, stage, len(examples), options.seed)
    plan = make_plan(examples, settings, options.seed, pool, replayed)
    steps = len(plan)
    for tuner in tuners.values():
        tuner.start(steps, options.seed)
    _measure(model, tuners, examples, options)
    if engine.rank == 0:
        _tell_contrasts(tuners, folder, number)
    probe = None
    if settings.probe and teacher:
        data = settings.probe.data
        seen = read_examples(chat, data, settings) if data else examples
        probe = Probe(spread(seen, settings.probe.samples), settings, teacher, engine)
    examples += pool

    optimizer = make_optimizer(model, rates, settings.weight_decay)
    state: dict[str, Any] = {
        "stage": number,
        "config": config_hash(options),
        "data": data_hash(stage.all_data),
        "base": start_hash(options.model),
        "attention": model.attention,
        "versions": versions(),
        "commit": commit(),
    }
    start = 0
    checkpoints = folder / "checkpoints"
    found = newest(checkpoints, number)
    if found is not None:
        saved = load_weights(found, model)
        check_origin(options, state["data"], saved, found)
        start = saved["stage_step"]
    engine.prepare(model, optimizer)
    check_rates(engine.optimizer, rates)
    for tuner in tuners.values():
        tuner.bind(engine.shards)
    if teacher:
        teacher.bind(engine.model, engine.shards)
    if found is not None:
        load_progress(found, model, engine.shards, tuners)
    if engine.rank == 0:
        cut_metrics(folder / "metrics.jsonl", first_step + start)
    model.train()

    # The loader runs ahead of the steps; the plan says which samples make up which step.
    shares = [shared(batch, settings, engine.rank, engine.count, idle=len(examples)) for batch in plan]
    loader: DataLoader[Batch | UserError] = DataLoader(
        [*examples, idle_example(examples)],  # type: ignore[arg-type]
        batch_sampler=[micro for share in shares[start:] for micro in share],
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
    with Meter(folder / "metrics.jsonl", label, start, steps, quiet=engine.rank > 0) as meter:
        signals.hold()
        for step in range(start, steps):
            step_number = first_step + step + 1
            every = [settings.log_every, *([settings.probe.every] if settings.probe else [])]
            log, *looks = (step == 0 or (step + 1) % n == 0 or step + 1 == steps for n in every)
            log = log or any(looks)
            # Of the step alone, so that a resumed run draws what the first run drew.
            torch.manual_seed(seed_of(options.seed, step_number, engine.rank))
            rates_now = set_rates(
                engine.optimizer, schedule_factor(settings.schedule, step, steps, settings.warmup)
            )
            supervised = sum(count_supervised(examples[i]) for i in plan[step])

            micros, losses, kls = [], [], []
            penalties: dict[str, torch.Tensor] = {}
            for i in range(len(shares[step])):
                micros.append(next(batches).to(engine.device))
                last = i + 1 == len(shares[step])
                if last:  # penalties count once per optimiser step
                    made = {part: tuner.before_backward(keep=log) for part, tuner in tuners.items()}
                    penalties = {part: penalty for part, penalty in made.items() if penalty is not None}
                with engine.micro(last):
                    # Weighted by supervised tokens: the step's loss is their mean, however it is split.
                    if teacher and stage.kl:
                        loss, kl = teacher.losses(micros[-1])
                        kls.append(kl.detach() / supervised)
                        loss_and_kl = loss + stage.kl.weight * kl
                    else:
                        loss = loss_and_kl = engine.model(micros[-1])
                    losses.append(loss.detach() / supervised)
                    engine.backward(loss_and_kl / supervised * engine.count, last)
            for tuner in tuners.values():
                tuner.after_backward()

            mine = [torch.stack(losses).sum(), torch.stack(kls).sum()] if kls else [torch.stack(losses).sum()]
            stopping = torch.tensor(float(signals.waiting is not None), device=engine.device)
            told = engine.shards.sum(torch.stack([*mine, *penalties.values(), stopping]).double()).tolist()
            names = ["loss", *["kl"] * bool(kls), *(f"penalty_{part}" for part in penalties)]
            values = dict(zip(names, told, strict=False))
            for name, value in values.items():
                if not math.isfinite(value):
                    bad = [m for m, each in zip(micros, losses, strict=True) if not each.isfinite()]
                    if not bad and engine.count == 1:
                        bad = micros
                    raise _not_finite(f"{SAID[name]} is {value} at step {step_number}", bad, checkpoints)
            line = {"step": step_number, "stage": number, **rates_now, **values}
            if log and penalties:
                line |= _gradient_norms(tuners)
            line["grad_norm"] = engine.step()
            if not math.isfinite(line["grad_norm"]):
                what = f"the gradient's norm is {line['grad_norm']} at step {step_number}"
                raise _not_finite(what, micros, checkpoints)
            for tuner in tuners.values():
                tuner.after_step(step + 1)

            meter.step(
                step + 1, values["loss"], len(plan[step]), sum(len(examples[i].ids) for i in plan[step])
            )
            if log:
                for tuner in tuners.values():
                    line |= tuner.densities() | tuner.update_norms()
                if probe and any(looks):
                    line |= probe.look()
                meter.log(line)
            # Several processes stop after the same step: the one before which all heard of it.
            stop = bool(told[-1]) if engine.count > 1 else signals.waiting is not None
            if step + 1 < steps and (stop or (step + 1) % settings.checkpoint.every == 0):
                _stop_if_weights_not_finite(model, engine.shards, step_number, micros, checkpoints)
                now = {**state, "step": step_number, "stage_step": step + 1}
                save_checkpoint(checkpoints / f"step-{step_number}", model, engine.shards, tuners, now)
                if engine.rank == 0:
                    prune_old(checkpoints, settings.checkpoint.keep)
                if stop:
                    signals.stop(f"after step {step_number}, with a checkpoint")
    for tuner in tuners.values():
        tuner.finish()
    _stop_if_weights_not_finite(model, engine.shards, first_step + steps, [], checkpoints)
    trained = {**state, "step": first_step + steps, "name": options.name, "seed": options.seed}
    save_model(model, engine.shards, done, trained)
    signals.release()
    engine.close()
    return first_step + steps


def _attach(
    model: VisionLanguageModel, tuners: dict[str, Tuner], folder: Path, number: int, tell: bool
) -> dict[str, float]:
    """Attaches the tuners and returns each trained part's rate. tell: saves and prints the tuning table."""
    rows = [row for part, tuner in tuners.items() for row in tuner.attach(model, part)]
    rates = {row.part: row.lr for row in rows if row.lr is not None}
    if not tell:
        return rates
    table = folder / "tuning_table.json"
    before = [row for row in read_json(table) if row["stage"] < number] if table.is_file() else []
    write_json(table, before + [{"stage": number, **row.to_dict()} for row in rows])
    print_tuning_table(rows)
    return rates


def _measure(
    model: VisionLanguageModel, tuners: dict[str, Tuner], examples: list[Example], options: RunOptions
) -> None:
    """Measures what the penalties' masks are made from, where that is not the weights alone."""
    penalties = [tuner.weight_penalty for tuner in tuners.values() if tuner.weight_penalty]
    watched = [one for penalty in penalties for one in penalty.measured.values()]
    if watched:
        samples = [examples[i] for i in chosen(len(examples), options.seed)]
        tell(f"penalty: its masks are measured on {len(samples)} samples")
        batches = (collate([sample], model.transform, model.language.pad_id) for sample in samples)
        measure(model, watched, batches, torch_dtype(options.model.dtype))


def _tell_contrasts(tuners: dict[str, Tuner], folder: Path, number: int) -> None:
    """Says how much the penalties' masks tell entries apart, and adds it to the tuning table, by module."""
    table = folder / "tuning_table.json"
    rows = read_json(table)
    for part, tuner in tuners.items():
        found = tuner.weight_penalty.contrasts() if tuner.weight_penalty else {}
        for row in rows:
            if (row["stage"], row["part"]) == (number, part):
                own = [found[name] for name in (row["module"], f"{row['module']}.weight") if name in found]
                row["mask_contrast"] = own[0] if own else None
        if found:
            tell(say_contrasts(part, list(found.values())))
    write_json(table, rows)


def _whole(made: Batch | UserError) -> Batch:
    """A batch from the loader; what went wrong in a worker is raised here."""
    if isinstance(made, UserError):
        raise made
    return made


def _gradient_norms(tuners: dict[str, Tuner]) -> dict[str, float]:
    """Of the penalties and of the task, over the parameters that a penalty falls on."""
    squares = [found for tuner in tuners.values() if (found := tuner.gradient_norms()) is not None]
    penalty, task = (math.sqrt(sum(each)) for each in zip(*squares, strict=True))
    ratio = {"penalty_grad_ratio": penalty / task} if task else {}
    return {"penalty_grad_norm": penalty, "task_grad_norm": task, **ratio}


def _stop_if_weights_not_finite(
    model: VisionLanguageModel, shards: Shards, step: int, micros: list[Batch], checkpoints: Path
) -> None:
    """Before they are saved, so that the checkpoint before stays the last one."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    broken = torch.stack([(~shards.local(p).isfinite()).sum() for _, p in trained])
    found = [name for (name, _), count in zip(trained, shards.sum(broken).tolist(), strict=True) if count]
    if found:
        named = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
        what = f"{len(found)} weights are not finite after step {step}: {named}"
        raise _not_finite(what, micros, checkpoints)


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

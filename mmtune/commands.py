"""What each subcommand of `mmtune` does with its arguments: calls the library, prints what comes out.

Each imports what it needs only when it is called, so that the others cost no torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mmtune.training.signals import Signals


def check_command(options: argparse.Namespace) -> None:
    if (options.yaml is None) == (options.language is None):
        raise UserError("give either a run's YAML or --language WEIGHTS", where="mmtune check")
    if options.language:
        from mmtune.training.check_language import check_language

        check_language(options.language, options.chat, options.dtype)
        print("no faults")
        return
    from mmtune.training.check import Gpus, check_run

    gpus = Gpus(options.processes, options.gpu_memory)
    check_run(options.yaml, options.overrides, options.samples, options.pictures, options.shapes, gpus)
    print("no faults")


def train_command(options: argparse.Namespace) -> None:
    from mmtune.core.processes import count
    from mmtune.training.signals import Signals

    go_on = _command("train", str(options.yaml), *options.overrides, "--resume")
    # With several processes a cluster's SIGTERM comes twice to each: from the cluster and from the launcher.
    with Signals(go_on, twice=count() == 1) as signals:
        _train_and_evaluate(options, signals)


def _train_and_evaluate(options: argparse.Namespace, signals: Signals) -> None:
    from mmtune.core.processes import rank, said_once
    from mmtune.evaluation.evaluate import check_data, evaluate_suite, print_results
    from mmtune.evaluation.protocol import load_suite
    from mmtune.run import read_run
    from mmtune.training.folder import is_finished, open_run

    with said_once():
        run = read_run(options.yaml, options.overrides)
        wanted = run.evaluate if run.evaluate and run.evaluate.at_end else None
        suite = load_suite(wanted.suite) if wanted else None
        if wanted and suite:  # what is missing is said now, not after hours of training
            check_data(suite.given, wanted.split, wanted.root, wanted.limit)
    final, done = run.folder / "final", "already done"
    if rank() == 0:
        open_run(run, options.resume)
    if not is_finished(run):
        from mmtune.training.loop import train

        train(run, options.resume, signals)
        done = "trained"
    if rank() == 0:
        print(f"{done}: {final}")
    if not wanted or not suite:
        return
    evaluations = evaluate_suite(
        final,
        suite,
        run.folder,
        wanted.split,
        wanted.attribution,
        wanted.scales,
        wanted.kl,
        batch_size=wanted.batch_size,
        limit=wanted.limit,
        root=wanted.root,
        dtype=wanted.dtype,
    )
    if rank() > 0:
        return
    for made in evaluations:
        print_results(made, _console())
    written = [
        run.folder / suite.folder(wanted.split, made["restored"], made.get("scale")) for made in evaluations
    ]
    print(f"evaluated: {', '.join(str(place / 'results.json') for place in written)}")


def eval_command(options: argparse.Namespace) -> None:
    from mmtune.core.processes import count, rank
    from mmtune.evaluation.divergence import add_kl
    from mmtune.evaluation.evaluate import evaluate, parse_gen_kwargs, print_results
    from mmtune.evaluation.protocol import load_suite
    from mmtune.evaluation.restore import find_base

    if len(options.restore or []) > 1:
        raise UserError("it is given more than once", where="--restore", mend="Put back one part at a time.")
    if options.kl and options.predict_only:
        raise UserError("--kl adds to scores, and --predict_only makes none", mend="Leave one of them out.")
    if options.base_results and not options.kl:
        raise UserError("--base_results is given, but nothing to do with it", mend="Give --kl as well.")
    if options.kl:
        find_base(options.model, options.base)  # said now, not after the answers
        if count() > 1 and not options.base_results:
            raise UserError(
                "several processes don't share the base's answers",
                where="--kl",
                mend="Give the base's own evaluation, --base_results DIR, or start one process.",
            )
    plain = options.kl and not options.restore and options.scale is None
    tasks = load_suite(options.suite).given if options.suite else options.tasks.split(",")
    question_files = _question_files(options.question_file)
    made = evaluate(
        options.model,
        tasks,
        options.output_path,
        split=options.split,
        batch_size=options.batch_size,
        limit=options.limit,
        root=options.data_root,
        max_new_tokens=parse_gen_kwargs(options.gen_kwargs),
        dtype=options.dtype,
        seed=options.seed,
        predict_only=options.predict_only,
        skip_done=options.skip_done,
        restore=options.restore[0] if options.restore else None,
        base=None if plain else options.base,
        scale=options.scale,
        decode=options.decode,
        question_files=question_files,
    )
    if rank() > 0:
        return
    if options.kl:
        made = add_kl(
            made,
            tasks,
            options.output_path,
            options.base,
            options.base_results,
            options.data_root,
            question_files,
        )
    if not options.predict_only:
        print_results(made, _console())
    print(f"results: {options.output_path}")


def _question_files(given: Sequence[str] | None) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in given or ():
        task, _, file = text.partition("=")
        if not file or task in files:
            what = "is given twice" if task in files else "names no file"
            raise UserError(
                f"'{text}' {what}", where="--question_file", mend="Write TASK=FILE, once for a task."
            )
        files[task] = Path(file)
    return files


def score_command(options: argparse.Namespace) -> None:
    from mmtune.core.files import readable_json, write_text
    from mmtune.evaluation.protocol import load_protocol
    from mmtune.evaluation.score import score_file

    protocol = load_protocol(options.task)
    split = options.split or protocol.report_split
    score = score_file(protocol.for_split(split), options.predictions, options.annotations, options.rule)
    for warning in filter(None, (protocol.other_count(split, score.n), *score.warnings)):
        print(f"mmtune: warning: {warning}", file=sys.stderr)
    if options.per_sample:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in score.per_question)
        write_text(options.per_sample, lines)
    expected = {"expected": protocol.expect[split]} if split in protocol.expect else {}
    print(readable_json({**score.summary(), "split": split, **expected}))


def report_command(options: argparse.Namespace) -> None:
    from mmtune.evaluation.protocol import load_suite
    from mmtune.evaluation.report import make_report
    from mmtune.evaluation.terminal import print_report

    suite = load_suite(options.suite)
    thumbnails = options.thumbnails * 1_000_000
    report = make_report(options.base, options.runs, suite, options.split, options.output_path, thumbnails)
    print_report(report, _console())


def compare_command(options: argparse.Namespace) -> None:
    from mmtune.evaluation.compare import compare, print_comparison

    report = compare(options.a, options.b, options.task, options.output_path)
    print_comparison(report, _console())
    if options.output_path:
        print(f"Written: {options.output_path / 'compare.json'}")


def analyse_command(options: argparse.Namespace) -> None:
    from mmtune.core.files import write_json
    from mmtune.evaluation.analyse import analyse, print_analysis
    from mmtune.evaluation.analysis_picture import draw_analysis

    analysis = analyse(options.adapters, options.base)
    print_analysis(analysis, options.modules, _console())
    if options.output_path:
        write_json(options.output_path / "analysis.json", analysis)
        draw_analysis(analysis, options.output_path / "analysis.png")
        print(f"Written: {options.output_path / 'analysis.json'}, {options.output_path / 'analysis.png'}")


def sequence_command(options: argparse.Namespace) -> None:
    from mmtune.evaluation.sequences import make_sequence, print_sequence

    report = make_sequence(options.base, options.stages, options.tasks.split(","), options.output_path)
    print_sequence(report, _console())
    print(f"Written: {options.output_path / 'sequence.json'}")


def assemble_command(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from mmtune.parts.assembly import Asked, assemble_folder, print_parts

    asked = Asked(**{field.name: getattr(options, field.name) for field in fields(Asked)})
    model = assemble_folder(asked, options.folder, options.seed)
    print_parts(model, asked, options.folder, _console())


def import_command(options: argparse.Namespace) -> None:
    from mmtune.interop.comparison import Compared, print_compared
    from mmtune.interop.importing import import_model
    from mmtune.interop.source import Wanted

    wanted = Wanted(options.fit, options.chat, options.base, options.vision)
    made = import_model(options.source, options.destination, wanted)
    print_compared([Compared(**row) for row in made["comparison"]], _console())
    for note in made["notes"]:
        print(note)
    print(f"written: {options.destination}")


def export_command(options: argparse.Namespace) -> None:
    from mmtune.interop.comparison import Compared, print_compared

    if options.target and options.to != "peft":
        raise UserError(f"--for does not go with --to {options.to}", mend="It goes with --to peft.")
    if options.dtype and options.to == "peft":
        raise UserError("--dtype does not go with --to peft: an adapter stays as it is")
    if options.to == "peft":
        from mmtune.interop.peft_export import export_peft

        made = export_peft(options.folder, options.destination, options.target == "llava-hf")
    elif options.to in ("vision", "connector", "language"):
        from mmtune.interop.part_export import export_part

        made = export_part(options.folder, options.destination, options.to, options.dtype or "float32")
    elif options.to == "llava-hf":
        from mmtune.interop.llava_hf_export import export_llava_hf

        made = export_llava_hf(options.folder, options.destination, options.dtype)
    elif options.to == "llava":
        from mmtune.interop.llava_export import export_llava

        made = export_llava(options.folder, options.destination, options.dtype)
    else:
        from mmtune.interop.merged import export_merged

        made = export_merged(options.folder, options.destination, options.dtype or "float32")
    print_compared([Compared(**row) for row in made["comparison"]], _console())
    if made.get("dequantized"):
        print(f"The base was held in {made['dequantized']}; it is dequantised: the same values, unpacked.")
    if made.get("update_lost_to_rounding", 0) > 0.01:
        lost = made["update_lost_to_rounding"]
        print(f"Of the update {lost:.0%} is lost to rounding; --dtype float32 keeps it.")
    for note in made.get("notes", []):
        print(note)
    print(f"written: {options.destination}")


def sweep_command(options: argparse.Namespace) -> None:
    from mmtune.experiments.sweep import run_sweep
    from mmtune.training.signals import Signals

    with Signals(_command("sweep", str(options.yaml), *options.overrides)) as signals:
        report = run_sweep(options.yaml, options.overrides, signals)
    from mmtune.evaluation.terminal import print_report

    print_report(report, _console())
    if "best" in report:
        print(f"best: {report['best']}")


def swap_tower_command(options: argparse.Namespace) -> None:
    from mmtune.experiments.swap_tower import commands, plan_swap, report_swap, run_swap
    from mmtune.training.signals import Signals

    if options.shapes:
        from mmtune.experiments.swap_shapes import check_shapes, print_shapes
        from mmtune.training.check import Gpus

        gpus = Gpus(options.processes, options.gpu_memory)
        print_shapes(check_shapes(options.yaml, options.overrides, gpus), gpus, _console())
        return
    if options.plan:
        planned = plan_swap(options.yaml, options.overrides)
        for words in commands(options.yaml, options.overrides, *planned):
            print(_command(*words))
        return
    if options.report:
        report = report_swap(options.yaml, options.overrides)
    else:
        with Signals(_command("swap-tower", str(options.yaml), *options.overrides)) as signals:
            report = run_swap(options.yaml, options.overrides, signals)
    from mmtune.experiments.swap_page import print_swap

    print_swap(report, _console())


def bench_generate_command(options: argparse.Namespace) -> None:
    from mmtune.bench.generate import bench_generate, print_generate
    from mmtune.core.files import write_json
    from mmtune.evaluation.protocol import load_suite

    suite = load_suite(options.suite)
    made = bench_generate(options.model, suite, options.limit, options.batch_size, options.data_root)
    print_generate(made, _console())
    if options.output_path:
        write_json(options.output_path, made)


def bench_train_command(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from mmtune.bench.train import BenchOptions, bench_train, print_train
    from mmtune.core.files import write_json

    asked = {field.name: getattr(options, field.name) for field in fields(BenchOptions)}
    asked["tuners"] = options.tuners.split(",")
    asked["targets"] = options.targets if options.targets == "all-linear" else options.targets.split(",")
    asked["penalised"] = options.penalised and options.penalised.split(",")
    made = bench_train(BenchOptions(**asked))
    print_train(made, _console())
    if options.output_path:
        write_json(options.output_path, made)


def bench_score_command(options: argparse.Namespace) -> None:
    from mmtune.bench.score import bench_score, print_score
    from mmtune.core.files import write_json
    from mmtune.core.versions import versions

    rows = bench_score(options.limit)
    print_score(rows, _console())
    if options.output_path:
        write_json(options.output_path, {"rules": rows, "environment": versions()})


def bench_penalty_command(options: argparse.Namespace) -> None:
    from mmtune.bench.penalty import QUICK, bench_penalty, print_penalty
    from mmtune.core.files import write_json

    made = bench_penalty(*QUICK) if options.quick else bench_penalty()
    print_penalty(made, _console())
    if options.output_path:
        write_json(options.output_path, made)


def _command(*arguments: str) -> str:
    return shlex.join(["mmtune", *arguments])


def _console() -> Console:
    from rich.console import Console

    return Console()


def shard_command(options: argparse.Namespace) -> None:
    from mmtune.data.sharding import write_shards

    root = options.image_root or options.file.parent
    name = write_shards(options.file, root, options.destination, options.samples_per_shard)
    print(f'written; in a run: data: [{{path: "{name}"}}]')


def prepare_command(options: argparse.Namespace) -> None:
    if options.name == "tiny":
        if options.source or options.cards or options.partial:
            what = "the tiny world is drawn: it has no originals, and all its cards are made"
            raise UserError(what, mend="Leave --source, --cards and --partial out.")
        _prepare_tiny(options.output_path or Path("datasets/tiny"), options.seed)
        return
    from mmtune.prepare.dataset import prepare

    none = options.cards == "none"
    cards = [] if none else options.cards.split(",") if options.cards else None
    prepare(options.name, options.source, options.output_path, cards, options.partial, options.seed)


def _prepare_tiny(folder: Path, seed: int) -> None:
    from mmtune.data.tiny import chance, generate
    from mmtune.data.tiny_tokenizer import train_tokenizer

    generate(folder, seed)
    train_tokenizer(folder, folder / "tokenizer")
    guesses = ", ".join(f"{task} {percent:.1f}" for task, percent in chance(folder).items())
    print(f"Chance, percent right on the test split without looking at picture or question: {guesses}.")

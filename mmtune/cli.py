"""The command `mmtune`: its subcommands and their arguments. What they do stands in commands.py."""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import mmtune.commands as commands
from mmtune.core.errors import UserError
from mmtune.data.chat import FORMATS
from mmtune.parts.spec import PARTS
from mmtune.prepare.originals import originals_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Exit codes: 0 done, 2 the user's mistake (one clear message), 1 a fault of ours."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    rest = [text for text in rest if not text.startswith("--local_rank=")]  # the deepspeed launcher adds it
    # argparse takes positional arguments in one go, but overrides may stand before and after flags.
    if rest and not ("overrides" in options and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # peft still asks transformers by the old name; nothing a user could mend.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    try:
        options.run(options)
    except UserError as error:
        count = len(error.faults)
        print(f"mmtune: {error}" if count == 1 else f"mmtune: {count} faults\n{error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        mend = "Look at its permissions and those of the folders above it, and at how long its name is."
        print(f"mmtune: {error.filename}: {error.strerror}\n    {mend}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"mmtune: {stopped or 'interrupted'}", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmtune",
        description="Assemble a vision-language model from parts, tune each part, see what was forgotten.",
    )
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = subcommands.add_parser("train", help="train a run and write runs/NAME")
    train.add_argument("yaml", type=Path, help="the run's YAML")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.clip=0.5")
    train.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    train.set_defaults(run=commands.train_command)

    check = subcommands.add_parser(
        "check", help="find every fault of a run and its data; show what is trained on"
    )
    check.add_argument("yaml", type=Path, nargs="?", help="the run's YAML")
    check.add_argument(
        "--language",
        metavar="WEIGHTS",
        help="instead of a run: can mmtune use this causal language model (a folder or hub name)? Loads it",
    )
    check.add_argument("--chat", default="template", help="the chat format it is tried with (--language)")
    check.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what it is held in (--language)"
    )
    check.add_argument("overrides", nargs="*", metavar="key=value")
    check.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="how many are shown (default: 3)"
    )
    check.add_argument(
        "--pictures",
        type=_count,
        default=1000,
        metavar="N",
        help="how many pictures are decoded, spread over all of them (default: 1000); all have to exist",
    )
    check.add_argument(
        "--shapes",
        action="store_true",
        help="from configs alone, of folders or known models: no weights, no tokenizer, no data",
    )
    check.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="the memory table is for so many (default: 1 for the engine single, else 4)",
    )
    check.add_argument(
        "--gpu_memory", type=_positive, default=24, metavar="GIB", help="of each GPU (default: 24)"
    )
    check.set_defaults(run=commands.check_command)

    evaluate = subcommands.add_parser("eval", help="a model's scores on tasks or a suite")
    evaluate.add_argument(
        "--model", type=Path, required=True, help="a model folder, for example runs/NAME/final"
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", help="names, or YAML files of your own, with commas between")
    what.add_argument("--suite", help="the name of a suite, or a YAML file of your own")
    evaluate.add_argument("--split", help="of every task (default: each task's own reporting split)")
    evaluate.add_argument(
        "--restore",
        choices=PARTS,
        action="append",
        help="put this part back as it is in the base: what sits in it?",
    )
    evaluate.add_argument(
        "--scale",
        type=_share,
        metavar="S",
        help="only this part of the way from the base, 0 to 1: W0 + S (W - W0)",
    )
    evaluate.add_argument(
        "--kl", action="store_true", help="how far it moved: KL to the base along the base's own answers"
    )
    evaluate.add_argument(
        "--base_results", type=Path, help="the base's own evaluation, whose answers --kl takes"
    )
    evaluate.add_argument(
        "--base", type=Path, help="the model that this one was trained from (default: where its run says)"
    )
    evaluate.add_argument("--output_path", type=Path, required=True)
    evaluate.add_argument("--batch_size", type=_positive, default=32)
    evaluate.add_argument("--limit", type=_positive, help="only the first so many questions of each task")
    evaluate.add_argument("--gen_kwargs", default="", help="max_new_tokens=N, instead of the protocol's")
    evaluate.add_argument(
        "--question_file",
        action="append",
        metavar="TASK=FILE",
        help="LLaVA's question file, whose prompts replace those of the task's protocol",
    )
    evaluate.add_argument(
        "--decode",
        choices=["generate", "likelihood"],
        help="an answer in the model's own words, or the likeliest of the options (default: the protocol's)",
    )
    evaluate.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="float32, the default, since only there the batch size changes no answer",
    )
    evaluate.add_argument(
        "--data_root", type=Path, help="where the data lies, instead of the protocol's root"
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, help="stamped into the results; decoding is greedy and draws nothing"
    )
    evaluate.add_argument(
        "--log_samples", action="store_true", help="as lm-eval's users write; every answer is always written"
    )
    what_for = evaluate.add_mutually_exclusive_group()
    what_for.add_argument("--predict_only", action="store_true", help="write the answers, score nothing")
    what_for.add_argument(
        "--skip_done", action="store_true", help="keep results of this very model, made in the same way"
    )
    evaluate.set_defaults(run=commands.eval_command)

    score = subcommands.add_parser("score", help="score a file of predictions against official annotations")
    score.add_argument("--task", required=True, help="its name, or a YAML file of your own")
    score.add_argument("--predictions", type=Path, required=True, help="JSONL or JSON: question_id and text")
    score.add_argument("--annotations", type=Path, required=True, help="the annotation file as published")
    score.add_argument("--rule", help="instead of the protocol's own")
    score.add_argument(
        "--split", help="of an annotation file that holds several (default: the reporting one)"
    )
    score.add_argument("--per_sample", type=Path, metavar="FILE", help="write a line per question here")
    score.set_defaults(run=commands.score_command)

    report = subcommands.add_parser("report", help="what was gained and what was forgotten")
    report.add_argument(
        "--base", type=Path, required=True, help="the folder with the base model's evaluation"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs/NAME")
    report.add_argument("--suite", required=True)
    report.add_argument("--split", help="that was asked of every task (default: each one's reporting split)")
    report.add_argument("--output_path", type=Path, required=True)
    report.add_argument(
        "--thumbnails", type=_count, default=8, metavar="MB", help="of pictures in report.html (default: 8)"
    )
    report.set_defaults(run=commands.report_command)

    compare = subcommands.add_parser("compare", help="two folders of results, lmms-eval's too, paired")
    compare.add_argument("a", type=Path, metavar="A", help="a folder with results.json, or lmms-eval's")
    compare.add_argument("b", type=Path, metavar="B", help="the same; every difference is B less A")
    compare.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="a task, or NAME_IN_A=NAME_IN_B"
    )
    compare.add_argument("--output_path", type=Path, help="write compare.json here")
    compare.set_defaults(run=commands.compare_command)

    analyse = subcommands.add_parser("analyse", help="what adapters did to the weights, and what they share")
    analyse.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="runs/NAME, a model folder, or one of peft's",
    )
    analyse.add_argument(
        "--base", type=Path, help="the frozen weights (default: those that each adapter was trained on)"
    )
    analyse.add_argument("--modules", action="store_true", help="a row for each module, not for each kind")
    analyse.add_argument("--output_path", type=Path, help="write analysis.json and analysis.png here")
    analyse.set_defaults(run=commands.analyse_command)

    sequence = subcommands.add_parser(
        "sequence", help="a model tuned on one task after another: what it kept"
    )
    sequence.add_argument("--base", type=Path, required=True, help="the folder with the base's evaluation")
    sequence.add_argument(
        "stages", type=Path, nargs="+", metavar="AFTER", help="the evaluation after each task"
    )
    sequence.add_argument("--tasks", required=True, help="in the order of tuning, with commas between")
    sequence.add_argument("--output_path", type=Path, required=True)
    sequence.set_defaults(run=commands.sequence_command)

    assembling = subcommands.add_parser(
        "assemble", help="a model folder from parts, whose weights stay where they are"
    )
    assembling.add_argument("folder", type=Path, metavar="OUT", help="the folder to write; not there yet")
    assembling.add_argument(
        "--vision", metavar="A", help="a tower: a folder, a hub name, a model folder whose tower it is to be"
    )
    assembling.add_argument(
        "--connector",
        metavar="B",
        help="a kind for a new one, also with options, 'resampler:{queries: 64}'; or a saved one's folder",
    )
    assembling.add_argument(
        "--language", metavar="C", help="a language model: a folder, a hub name, a model folder"
    )
    assembling.add_argument("--base", metavar="DIR", help="a model folder, whose other parts are taken")
    assembling.add_argument("--tower", help="the tower's family (default: by its config)")
    assembling.add_argument("--layer", type=int, metavar="-N", help="whose output is taken (default: -2)")
    assembling.add_argument("--fit", choices=["pad", "crop", "squash", "own"], help="(default: pad)")
    assembling.add_argument(
        "--image_size", type=_positive, metavar="PIXELS", help="(default: the tower's own)"
    )
    assembling.add_argument("--chat", choices=FORMATS, help="the chat format (default: template)")
    assembling.add_argument("--seed", type=int, default=0, help="of the new connector (default: 0)")
    assembling.set_defaults(run=commands.assemble_command)

    importing = subcommands.add_parser(
        "import", help="a model of another project as a model folder, compared"
    )
    importing.add_argument(
        "source", metavar="SRC", help="a folder of llava-hf or of the original LLaVA, or its name on the hub"
    )
    importing.add_argument("destination", type=Path, metavar="DST", help="the folder to write; not there yet")
    importing.add_argument(
        "--fit",
        choices=["pad", "crop"],
        help="how pictures become square (default: as the files say; LLaVA-1.5 was trained with pad)",
    )
    importing.add_argument("--chat", choices=FORMATS, help="the chat format (default: by its files)")
    importing.add_argument("--base", help="what a LoRA or a projector was trained on, a folder or a hub name")
    importing.add_argument("--vision", help="the tower, where not the one that LLaVA's config names")
    importing.set_defaults(run=commands.import_command)

    export = subcommands.add_parser("export", help="a model in another form, compared by its logits")
    export.add_argument(
        "folder", type=Path, metavar="DIR", help="a model folder, for example runs/NAME/final"
    )
    export.add_argument("destination", type=Path, metavar="DST", help="the folder to write; not there yet")
    export.add_argument(
        "--to",
        choices=["merged", "llava-hf", "llava", "peft", *PARTS],
        required=True,
        help="merged: adapters in the weights, nothing in 4 bits; llava-hf: for transformers and vLLM; "
        "llava: for the original LLaVA-1.5; peft: the language model's adapter alone; "
        "vision, connector, language: that part alone, its adapter in its weights",
    )
    export.add_argument(
        "--for",
        dest="target",
        choices=["llava-hf"],
        help="with --to peft: the adapter loads on transformers' LlavaForConditionalGeneration",
    )
    export.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the merged weights (default: float32, since bfloat16 rounds most of a small update away); "
        "with llava-hf and llava of every weight (default: what is not merged stays as it is)",
    )
    export.set_defaults(run=commands.export_command)

    sweep = subcommands.add_parser("sweep", help="train and evaluate a grid of overrides; ends in one report")
    sweep.add_argument("yaml", type=Path)
    sweep.add_argument("overrides", nargs="*", metavar="key=value")
    sweep.set_defaults(run=commands.sweep_command)

    swap = subcommands.add_parser("swap-tower", help="other towers in a model: aligned, tuned, compared")
    swap.add_argument("yaml", type=Path)
    swap.add_argument("overrides", nargs="*", metavar="key=value")
    only = swap.add_mutually_exclusive_group()
    only.add_argument(
        "--shapes",
        action="store_true",
        help="whether each tower fits the language model and the GPUs, from configs alone",
    )
    only.add_argument(
        "--plan", action="store_true", help="check, fit, write a YAML for each run; print what is left to do"
    )
    only.add_argument("--report", action="store_true", help="the report alone, of the runs that are finished")
    swap.add_argument(
        "--processes", type=_positive, metavar="N", help="with --shapes: the memory is for so many GPUs (4)"
    )
    swap.add_argument(
        "--gpu_memory", type=_positive, default=24, metavar="GIB", help="with --shapes: of each GPU (24)"
    )
    swap.set_defaults(run=commands.swap_tower_command)

    bench = subcommands.add_parser("bench", help="what this machine does, as ratios to the plain form")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    generating = benches.add_parser("generate", help="answers in batches against one question at a time")
    generating.add_argument("--model", type=Path, default=Path("data/tiny/model"))
    generating.add_argument("--suite", default="tiny")
    generating.add_argument("--limit", type=_positive, default=100, help="questions of each task (100)")
    generating.add_argument("--batch_size", type=_positive, default=100)
    generating.add_argument("--data_root", type=Path, help="instead of each protocol's root")
    generating.add_argument("--output_path", type=Path, help="write the figures to this file, as JSON")
    generating.set_defaults(run=commands.bench_generate_command)
    training = benches.add_parser("train", help="the whole training step of tuners, in turns")
    training.add_argument("--tuners", default="lora,lorasculpt", help="the first is what ratios are to")
    training.add_argument("--width", type=_positive, default=512)
    training.add_argument("--layers", type=_positive, default=4)
    training.add_argument("--tokens", type=_positive, default=8192, help="of an optimiser step")
    training.add_argument("--length", type=_positive, default=512, help="tokens of a row")
    training.add_argument("--rows", type=_positive, default=4, help="in a forward pass")
    training.add_argument("--rank", type=_positive, default=32)
    training.add_argument("--density", type=_share, default=0.1)
    training.add_argument(
        "--targets", default="all-linear", help="all-linear, or patterns: *.q_proj,*.v_proj"
    )
    training.add_argument("--penalised", help="patterns of those the penalty falls on (default: all targets)")
    training.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    training.add_argument("--activation_checkpointing", action="store_true")
    training.add_argument("--steps", type=_positive, default=10, help="timed before and after the prune (10)")
    training.add_argument("--output_path", type=Path, metavar="FILE", help="write the figures here, as JSON")
    training.set_defaults(run=commands.bench_train_command)
    scoring = benches.add_parser("score", help="predictions scored per second, rule by rule")
    scoring.add_argument("--limit", type=_positive, default=200_000, help="predictions of each rule")
    scoring.add_argument("--output_path", type=Path, metavar="FILE", help="write the same as JSON")
    scoring.set_defaults(run=commands.bench_score_command)
    penalising = benches.add_parser("penalty", help="the conflict penalty against its plain form")
    penalising.add_argument("--quick", action="store_true", help="small matrices alone, in a few seconds")
    penalising.add_argument("--output_path", type=Path, metavar="FILE", help="write the same as JSON")
    penalising.set_defaults(run=commands.bench_penalty_command)

    data = subcommands.add_parser("data", help="prepare a dataset")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="make what cards and protocols read")
    prepare.add_argument(
        "name",
        choices=["tiny", *originals_names()],
        help="tiny: the world that ships with mmtune, drawn from a seed; the others: as they were published",
    )
    prepare.add_argument("--source", type=Path, help="where the originals lie (default: the output path)")
    prepare.add_argument("--output_path", type=Path, help="default: datasets/NAME")
    prepare.add_argument(
        "--cards", help="whose training files are made: names with commas between, or none (default: all)"
    )
    prepare.add_argument(
        "--partial", action="store_true", help="take data that is not whole, or not as published, and say so"
    )
    prepare.add_argument(
        "--seed", type=int, default=0, help="of the order of the samples, or of the tiny world"
    )
    prepare.set_defaults(run=commands.prepare_command)
    shard = actions.add_parser("shard", help="a LLaVA training file and its pictures as webdataset shards")
    shard.add_argument("file", type=Path, metavar="LLAVA.json", help="or .jsonl")
    shard.add_argument("destination", type=Path, metavar="DST", help="the folder to write; not there yet")
    shard.add_argument(
        "--image_root", type=Path, help="what its pictures' paths are relative to (default: its folder)"
    )
    shard.add_argument("--samples_per_shard", type=_positive, default=1000, metavar="N")
    shard.set_defaults(run=commands.shard_command)
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found '{text}'") from None
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, found {text}")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found '{text}'") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, found {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())

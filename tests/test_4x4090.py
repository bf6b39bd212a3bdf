"""The scripts for four GPUs, end to end on small stand-ins: a random Llava model as transformers saves it,
the six sets in their official layouts, two gloo processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmtune.training.check import check_run
from tests import official
from tests.tiny_llava import save_llava_hf

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "train.epochs=null",
    "train.steps=4",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.workers=0",
    "tune.language.rank=4",
]
SOURCE_TASKS = ["okvqa", "ocrvqa", "gqa", "textvqa_ocr"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Path:
    """A checkout's scripts, the originals of the data and a model beside them."""
    folder = tmp_path_factory.mktemp("four") / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    official.make(folder / "originals")
    save_llava_hf(folder / "hub/any-name", tokenizer=make_tokenizer("llama_first"))
    return folder


def run(checkout: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/{script}", *arguments],
        cwd=checkout,
        env=environment(checkout, **variables),
        capture_output=True,
        text=True,
        timeout=1800,
    )


def environment(checkout: Path, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MODEL": str(checkout / "hub/any-name"),
        "SOURCES": str(checkout / "originals"),
        "GPUS": "2",
        "LIMIT": "4",
        "EVAL_BATCH": "4",
        "PARTIAL": "yes",
        **variables,
    }


def reported(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_iconqa_from_the_originals_to_the_report(checkout: Path) -> None:
    short = [*SHORT, "tune.language.prune_at=2"]
    ran = run(checkout, "iconqa_4x4090.sh", "lorasculpt", *short)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-6000:]
    report = reported(checkout / "runs/iconqa/report")
    (made,) = report["runs"]
    assert made["name"] == "lorasculpt_s0" and made["tuner"] == "lorasculpt"
    assert set(made["scores"]) == {*SOURCE_TASKS, "iconqa_lorasculpt"}
    assert all(score["n"] == 4 for score in made["scores"].values())
    assert any("not the official data" in warning for warning in report["warnings"])
    assert set(made["attribution"]) == {"language_off", "connector_restored"}
    lines = (checkout / "runs/iconqa/lorasculpt_s0/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 4 and 0.05 < last["density_a"] < 0.11
    assert (checkout / "runs/iconqa/report/report.html").is_file()


def test_other_scores_of_a_run_that_is_there(checkout: Path) -> None:
    suite = "name: mine\nsource: [okvqa, gqa]\ntarget: [iconqa_choose_txt]\n"
    (checkout / "own.yaml").write_text(suite)
    ran = run(checkout, "forgetting_4x4090.sh", SUITE=str(checkout / "own.yaml"))
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-6000:]
    (made,) = reported(checkout / "runs/iconqa/report-mine")["runs"]
    assert set(made["scores"]) == {"okvqa", "gqa", "iconqa_choose_txt"}
    assert set(made["attribution"]) == {"language_off", "connector_restored"}


def test_coco_captions(checkout: Path) -> None:
    ran = run(checkout, "coco_4x4090.sh", "lora", *SHORT)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-6000:]
    (made,) = reported(checkout / "runs/coco/report")["runs"]
    assert made["tuner"] == "lora" and set(made["scores"]) == {*SOURCE_TASKS, "coco_caption"}


# ---- Stopped by a cluster ---------------------------------------------------------------------------------

# Stands for torchrun: told to stop, it takes a while and leaves a checkpoint, and fails, as torchrun does.
TORCHRUN = """#!/usr/bin/env bash
trap 'sleep 1; touch checkpoint; exit 1' TERM
touch started
while true; do sleep 0.1; done
"""
# Stand for Slurm's own commands.
SRUN = '#!/usr/bin/env bash\nshift\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$@" > scontrol.log\n'


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A checkout with commands that only stand for those it calls."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    commands = {"mmtune": "#!/usr/bin/env bash\n", "torchrun": TORCHRUN, "srun": SRUN, "scontrol": SCONTROL}
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", ["iconqa_4x4090.sh", "iconqa_slurm.sh"])
def test_a_stopped_job_has_its_checkpoint(cluster: Path, script: str) -> None:
    slurm = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(
        ["bash", f"scripts/{script}"],
        cwd=cluster,
        env={**os.environ, **slurm, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(200):
        if (cluster / "started").exists():
            break
        time.sleep(0.1)
    # To the steps of a job, as --signal says; the job's own shell hears nothing of it.
    whole = psutil.Process(job.pid)
    for process in [*([] if "slurm" in script else [whole]), *whole.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # the stand-in's sleeps come and go
            process.terminate()
    assert job.wait(timeout=30) == 143
    assert (cluster / "checkpoint").exists()
    queued = cluster / "scontrol.log"
    assert (queued.read_text() == "requeue 7\n") if "slurm" in script else not queued.exists()


def test_a_job_that_failed_is_not_queued_again(cluster: Path) -> None:
    (cluster / "bin/srun").write_text("#!/usr/bin/env bash\nexit 2\n")
    environment = {**os.environ, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}"}
    slurm = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7"}
    ran = subprocess.run(["bash", "scripts/iconqa_slurm.sh"], cwd=cluster, env={**environment, **slurm})
    assert ran.returncode == 2 and not (cluster / "scontrol.log").exists()


# ---- What is asked of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["iconqa_4x4090.sh", "coco_4x4090.sh", "forgetting_4x4090.sh"])
def test_a_method_that_is_unknown(cluster: Path, script: str) -> None:
    ran = run(cluster, script, "lorasculp")
    assert ran.returncode == 2 and "unknown method 'lorasculp'; known: all lora " in ran.stderr


def test_what_it_is_for(cluster: Path) -> None:
    ran = run(cluster, "coco_4x4090.sh", "--help")
    assert ran.returncode == 0 and "Usage: bash scripts/coco_4x4090.sh [METHOD ...]" in ran.stdout


def test_an_evaluation_that_the_base_would_not_have(cluster: Path) -> None:
    ran = run(cluster, "iconqa_4x4090.sh", "evaluate.dtype=float32")
    assert ran.returncode == 2 and "set SUITE, LIMIT, EVAL_BATCH or DTYPE instead" in ran.stderr


def test_a_run_that_is_not_there(cluster: Path) -> None:
    ran = run(cluster, "forgetting_4x4090.sh", "lora")
    assert ran.returncode == 2
    assert "no finished run runs/iconqa/lora_s0; train it: bash scripts/iconqa_4x4090.sh lora" in ran.stderr


def methods() -> list[str]:
    return bash("echo $METHODS").split()


def bash(command: str) -> str:
    steps = f"source {ROOT / 'scripts/4x4090/steps.sh'}; {command}"
    return subprocess.run(["bash", "-c", steps], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("method", methods())
def test_the_parts_of_every_method_fit(
    method: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml, *changes = bash(f'describe_method {method}; printf "%s\\n" "$yaml" "${{changes[@]}}"').split("\n")
    small = [f"model.base={checkout / 'hub/any-name'}", "tune.language.rank=4"]
    if "preset" in "".join(changes):
        small[1] = "tune={preset: reference, language: {rank: 4}}"
    check_run(ROOT / yaml, [*filter(None, changes), *small], shapes=True)
    assert "Memory per GPU" in capsys.readouterr().out


@pytest.mark.parametrize("yaml", ["lora", "lorasculpt"])
def test_llava_7b_fits_24_gib(yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_run(ROOT / f"scripts/4x4090/{yaml}.yaml", shapes=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "7,050,830,848 in all" in said and "GiB, fits." in said

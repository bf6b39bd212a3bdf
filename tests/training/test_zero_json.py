"""A DeepSpeed JSON may say how DeepSpeed works, never what is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.run import TrainOptions
from mmtune.training.zero import ZeroEngine
from mmtune.training.zero_json import STAGES, json_faults, shipped_json, zero_config
from tests import world

SETTINGS = TrainOptions(batch_size=16, micro_batch_size=4, steps=3, clip=0.5, engine="zero2")


def faults(count: int | None = None, zero: dict[str, Any] | None = None, **blocks: Any) -> list[str]:
    found = {"zero_optimization": {"stage": 2, **(zero or {})}, **blocks}
    return [fault.where for fault in json_faults(found, SETTINGS, count)]


@pytest.mark.parametrize("engine", STAGES)
def test_what_ships_is_complete_and_takes_everything_from_the_yaml(engine: str) -> None:
    settings = TrainOptions(batch_size=16, micro_batch_size=4, steps=3, clip=0.5, engine=engine)  # type: ignore[arg-type]
    found = zero_config(settings, "bfloat16", count=2)
    assert (
        found["zero_optimization"]["stage"]
        == STAGES[engine]
        == json.loads(shipped_json(engine).read_text())["zero_optimization"]["stage"]
    )
    assert found["gradient_clipping"] == 0.5
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 1)
    assert found["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert not zero_config(settings, "float32", count=2)["torch_autocast"]["enabled"]
    assert "auto" not in json.dumps({k: v for k, v in found.items() if k != "torch_autocast"})


def test_what_common_files_say_is_taken() -> None:
    assert (
        faults(
            count=2,
            zero={
                "overlap_comm": True,
                "reduce_bucket_size": "auto",
                "offload_optimizer": {"device": "none"},
            },
            bf16={"enabled": "auto"},
            fp16={"enabled": False, "loss_scale": 0},
            train_batch_size=16,
            train_micro_batch_size_per_gpu=4,
            gradient_accumulation_steps=2,
            gradient_clipping=0.5,
            steps_per_print=100,
            wall_clock_breakdown=False,
        )
        == []
    )


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"train_batch_size": 32}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"gradient_acumulation_steps": 2}, "gradient_acumulation_steps"),
        ({"zero": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
        ({"zero": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param"),
        # DeepSpeed deals the pieces out in another order than its own map of them says.
        ({"zero": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        ({"zero": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights"),
    ],
)
def test_what_would_change_the_result_is_refused(blocks: dict[str, Any], where: str) -> None:
    assert faults(**blocks) == [where]


def test_accumulation_can_be_held_to_the_run_once_the_processes_are_known() -> None:
    assert faults(gradient_accumulation_steps=4) == []
    assert faults(gradient_accumulation_steps=4, count=1) == []
    assert faults(gradient_accumulation_steps=4, count=2) == ["gradient_accumulation_steps"]


def test_a_file_without_zero_is_refused() -> None:
    assert [fault.where for fault in json_faults({"optimizer": {}}, SETTINGS)] == ["zero_optimization"]
    assert [fault.where for fault in json_faults([1], SETTINGS)] == ["zero_optimization"]


def test_the_yaml_is_refused_with_every_fault_and_the_reason(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(
        json.dumps({"optimizer": {"type": "AdamW"}, "scheduler": {}, "zero_optimization": {"stage": 3}})
    )
    with pytest.raises(UserError) as caught:
        world.run_options(tmp_path, tmp_path, train={"engine": "zero2", "deepspeed": str(mine)})
    said = str(caught.value)
    assert "a single learning rate for all parts" in said
    assert "the schedule is train.schedule's" in said
    assert "is 3, but the run's engine is zero2" in said


def test_a_json_without_a_zero_engine_and_one_that_is_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is for zero1, zero2 and zero3"):
        world.run_options(tmp_path, tmp_path, train={"deepspeed": str(shipped_json("zero1"))})
    with pytest.raises(UserError, match=r"nowhere\.json"):
        world.run_options(tmp_path, tmp_path, train={"engine": "zero1", "deepspeed": "nowhere.json"})


def test_where_deepspeed_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.training.zero.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mmtune\[deepspeed\]"):
        ZeroEngine.check(SETTINGS)


def test_a_config_that_a_launcher_sets_must_be_the_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(shipped_json("zero2").read_text())
    monkeypatch.setitem(os.environ, "ACCELERATE_DEEPSPEED_CONFIG_FILE", str(mine))
    with pytest.raises(UserError, match=r"train\.deepspeed="):
        ZeroEngine.check(SETTINGS)
    ZeroEngine.check(TrainOptions(batch_size=16, steps=3, engine="zero2", deepspeed=mine))


def test_nothing_here_imports_torch_or_deepspeed() -> None:
    code = "import sys, mmtune.training.zero_json; assert not {'torch', 'deepspeed'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

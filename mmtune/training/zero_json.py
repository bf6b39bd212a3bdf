"""The JSON that DeepSpeed takes, held to what the run says elsewhere. No torch, no deepspeed.

A JSON may set how DeepSpeed works (buckets, overlap, reports), never what is computed: batch sizes, clipping,
the optimiser, rates and precision are the YAML's. What is not known to keep to that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.core.table import nearest

if TYPE_CHECKING:
    from mmtune.run import TrainOptions

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
AUTO = "auto"
# What says nothing about the result.
REPORTS = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet",
}  # fmt: skip
SIZES = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
PRECISIONS = {"bf16", "fp16"}
ZERO = {
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
    "allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "sub_group_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip
OFFLOADS = {"offload_optimizer", "offload_param"}
REASONS = {
    "optimizer": "the optimiser is mmtune's: one that is made from this block has a single learning rate for "
    "all parts",
    "scheduler": "the schedule is train.schedule's: two would both set the rates",
    "torch_autocast": "model.dtype decides in which precision is computed",
    "communication_data_type": "gradients are reduced in fp32, as on every other engine",
}


def shipped_json(engine: str) -> Path:
    """The JSON that mmtune brings for zero1, zero2 or zero3."""
    return Path(__file__).with_name(f"{engine}.json")


def zero_config(settings: TrainOptions, dtype: str, count: int) -> dict[str, Any]:
    """What DeepSpeed is given for a stage on `count` processes. dtype: of the model.

    Raises UserError with every fault of a JSON of one's own.
    """
    path = settings.deepspeed or shipped_json(settings.engine)
    found = read_json(path)
    if faults := list(json_faults(found, settings, count)):
        raise UserError.of(Fault(fault.what, f"{path}: {fault.where}", fault.mend) for fault in faults)
    config: dict[str, Any] = _without_auto(found)
    for key in (*PRECISIONS, *SIZES):
        config.pop(key, None)
    config["zero_optimization"]["stage"] = STAGES[settings.engine]
    return config | {
        # How many samples a step has is not DeepSpeed's to know: each backward pass says whether it is the
        # last of a step, and losses come weighted.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        # Without an empty list, DeepSpeed reduces the gradients of linear layers in bf16.
        "torch_autocast": {
            "enabled": dtype == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": config.get("steps_per_print", 2**31),
    }


def json_faults(found: Any, settings: TrainOptions, count: int | None = None) -> Iterator[Fault]:
    """What in a DeepSpeed JSON contradicts the run; `where` is the key. count: of processes, where known."""
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict):
        yield Fault("there is no zero_optimization block", "zero_optimization", "Start from one of mmtune's.")
        return
    micro = settings.micro_batch_size
    wanted: dict[str, Any] = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": None,
        "gradient_clipping": settings.clip,
    }
    if count:
        wanted["train_micro_batch_size_per_gpu"] = micro or settings.batch_size // count
        wanted["gradient_accumulation_steps"] = settings.batch_size // (micro * count) if micro else 1
    for key, value in found.items():
        if key in REASONS:
            yield Fault(f"the block '{key}' cannot be taken: {REASONS[key]}", key, "Remove it.")
        elif key in PRECISIONS:
            if isinstance(value, dict) and value.get("enabled") not in (AUTO, False, None):
                yield Fault(
                    f"{key} would round the weights that train in each forward pass",
                    f"{key}.enabled",
                    "Say auto or false. model.dtype: bfloat16 computes in bf16 and keeps them in fp32.",
                )
        elif key in wanted:
            if value != AUTO and wanted[key] is not None and value != wanted[key]:
                yield Fault(f"is {value}, but the run's is {wanted[key]}", key, "Say auto.")
        elif key not in REPORTS | {"zero_optimization", "zero_allow_untested_optimizer"}:
            yield _unknown(key, key, {*REPORTS, *wanted, "zero_optimization"})
    stage = STAGES.get(settings.engine)
    if stage and zero.get("stage", AUTO) not in (AUTO, stage):
        mend = f"Say auto, or train.engine=zero{zero['stage']}."
        where = "zero_optimization.stage"
        yield Fault(f"is {zero['stage']}, but the run's engine is {settings.engine}", where, mend)
    for key, value in zero.items():
        where = f"zero_optimization.{key}"
        if key in OFFLOADS:
            if value and value.get("device", "none") not in ("none", AUTO):
                what = (
                    f"device is {value['device']}, which mmtune does not do: what trains is held by the GPUs"
                )
                yield Fault(what, where, "Remove it.")
        elif key not in ZERO and value is not False:
            yield _unknown(key, where, ZERO)


def _unknown(key: str, where: str, known: set[str]) -> Fault:
    mend = nearest(key, sorted(known)) or "Remove it."
    return Fault(f"'{key}' is not known to leave what is computed as it is", where, mend)


def _without_auto(found: dict[str, Any]) -> dict[str, Any]:
    """Without what is left to others: then DeepSpeed's own default holds."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else deepcopy(value)
        for key, value in found.items()
        if value != AUTO
    }

"""Looks at what ZeRO's shards say of a small model, beside what DeepSpeed's own getters say of it.

`torchrun --nproc_per_node 3 -m tests.tuning.zero_pieces OUT.json`: a line of findings for each kind of ZeRO;
each is a count of what differs, by what was looked at.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmtune.run import TrainOptions
from mmtune.training.engine import make_engine, open_processes

# Three processes and odd sizes: pieces that begin inside a row, that are short, and that are empty.
SHAPES = {"first": (7, 5), "second": (3, 7), "third": (2, 3)}
# In ZeRO-3: nothing stays whole; some does; all does. Several runs of masters where sub_group_size is small.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3 none whole": ("zero3", {"stage3_param_persistence_threshold": 0, "sub_group_size": 8}),
    "zero3 some whole": ("zero3", {"stage3_param_persistence_threshold": 10}),
    "zero3 all whole": ("zero3", {"stage3_param_persistence_threshold": 1000}),
}


class Small(nn.Module):
    """Two layers that train, the second without a bias, and a frozen one in bf16 between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7, bias=False).bfloat16().requires_grad_(False)
        self.second = nn.Linear(7, 3, bias=False)
        self.third = nn.Linear(3, 2)
        self.seen: dict[str, torch.Tensor] = {}
        self.every_part = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.frozen(x.bfloat16()).float()
        return self.third(self.second(x)).square().sum()

    def _look(self, name: str) -> Any:
        def look(module: nn.Module, _: Any) -> None:
            weight: Any = module.weight
            self.seen[name] = weight.detach().clone()

        return look


def look_at(kind: str, folder: Path, rank: int, count: int) -> dict[str, int]:
    """How often something differs in this kind of ZeRO."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
    )

    engine_name, zero = KINDS[kind]
    own = folder / f"{kind}.{rank}.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": int(engine_name[-1]), **zero}}))
    settings = TrainOptions(batch_size=count, steps=3, clip=1e9, engine=engine_name, deepspeed=own)  # type: ignore[arg-type]
    model: Any = Small()
    frozen = model.frozen.weight.detach().clone()
    groups: list[dict[str, Any]] = [
        {"params": list(model.first.parameters()), "lr": 1e-2, "rate": 1e-2, "name": "one"},
        {
            "params": [*model.second.parameters(), *model.third.parameters()],
            "lr": 1e-3,
            "rate": 1e-3,
            "name": "two",
        },
    ]
    weights = {name: getattr(model, name).weight for name in SHAPES}
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    engine = make_engine(settings, "float32")
    engine.prepare(model, torch.optim.AdamW(groups))
    for name in SHAPES:  # after DeepSpeed's own hooks, which gather
        getattr(model, name).register_forward_pre_hook(model._look(name))
    shards = engine.shards
    differ: dict[str, int] = {}

    def hold(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
        wrong = one.shape != other.shape or not torch.equal(one.float(), other.float())
        differ[name] = differ.get(name, 0) + int(wrong)

    fired = []
    shards.on_gradient(weights["second"], lambda g: fired.append(g.shape) or g * 2)  # type: ignore[func-returns-value]

    def step() -> None:
        for last in (False, True):
            torch.manual_seed(rank + 10 * last)
            engine.backward(engine.model(torch.randn(2, 5)), last)
        for p in trained:
            hold("gradient", shards.whole(p, shards.gradient(p)), safe_get_full_grad(p))
        engine.step()

    for p, value in zip(trained, start, strict=True):
        hold("values before the first step", shards.whole(p), value)
        hold("shape", torch.zeros(shards.shape(p)), torch.zeros_like(value))
        differ["moments before the first step"] = len(shards.moments(p)) + len(shards.saved_moments(p))
    hold("frozen", shards.frozen(model.frozen.weight), frozen)
    found = shards.segment(model.frozen.weight)  # None where it lies whole
    if found is not None:
        entries, place = found
        hold("segment", entries, frozen.flatten()[place : place + len(entries)])
        hold("segments together", shards.sum(torch.tensor([float(len(entries))])), torch.tensor([49.0]))
    step()
    if engine_name != "zero3":
        # DeepSpeed links the states of all groups when the first group has stepped, and never again: its
        # getters then find none of the others'.
        engine.model.optimizer._hp_optimizer_states_linked = False
        engine.model.optimizer._lazy_init_hp_params_optimizer_state()
    differ["hooks"] = int([tuple(shape) for shape in fired] != [SHAPES["second"]] * 2)
    for p in trained:
        hold("values", shards.whole(p), safe_get_full_fp32_param(p))
        for name, moment in shards.saved_moments(p).items():
            if name == "step":
                hold("count", moment, torch.tensor(1.0))
            else:
                hold(name, moment, safe_get_full_optimizer_state(p, name))
    for one, p in zip(shards.wholes(trained), trained, strict=True):
        hold("wholes", one, shards.whole(p))
    masks = {}
    for name, p in weights.items():
        whole = shards.whole(p)
        masks[name] = torch.arange(whole.numel()).view(whole.shape) % 3 == 0
        shards.zero_outside(p, masks[name])
        hold("masked", shards.whole(p), whole * masks[name])
        for moment in shards.moments(p).values():
            moment.masked_fill_(~shards.piece(p, masks[name]), 0)
        shards.on_gradient(p, lambda g, mask=masks[name]: g * mask)  # type: ignore[misc]
    for _ in range(2):
        step()
        for name, seen in model.seen.items():
            hold("outside in the forward pass", seen * ~masks[name], torch.zeros(seen.shape))
            differ["nothing inside"] = int(not seen.any())
        for name, p in weights.items():
            hold("outside after a step", shards.whole(p) * ~masks[name], torch.zeros(SHAPES[name]))
    values = {p: torch.full(SHAPES[name], 0.5) for name, p in weights.items()}
    before = [shards.whole(p) for p in trained]
    with torch.no_grad():
        with shards.seen_as(values):
            engine.model(torch.randn(2, 5))
        for name, p in weights.items():
            hold("seen as", model.seen[name], values[p])
        engine.model(torch.randn(2, 5))
    for name, p in weights.items():
        hold("seen again", model.seen[name], shards.whole(p))
    for p, value in zip(trained, before, strict=True):
        hold("values after they were seen as others", shards.whole(p), value)
    # Loaded before a first step, as a resumed run does it.
    saved = [shards.saved_moments(p) for p in trained]
    engine.close()
    again: Any = Small()
    fresh = [p for p in again.parameters() if p.requires_grad]
    in_groups = [fresh[:2], fresh[2:]]
    engine = make_engine(settings, "float32")
    engine.prepare(again, torch.optim.AdamW([{"params": group} for group in in_groups]))
    for p, moments in zip(fresh, saved, strict=True):
        engine.shards.load_moments(p, moments)
    for p, moments in zip(fresh, saved, strict=True):
        for name, moment in engine.shards.saved_moments(p).items():
            hold(f"{name} loaded", moment, moments[name])
    engine.close()
    return differ


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank = open_processes()
    count = dist.get_world_size()
    for kind in KINDS:
        found = look_at(kind, out, rank, count)
        (out / f"{kind}.{rank}.found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Low-rank adapters of peft on chosen linear layers of a part, with an optional conflict penalty."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmtune.core.config import Report
from mmtune.core.errors import UserError
from mmtune.tuning.base import PenaltyOptions, Row, Tuner, entries, matching, own_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmtune.parts.model import VisionLanguageModel


@dataclass
class LoraOptions:
    """dW = (alpha / rank) B A.

    targets: `all-linear` (each linear layer of the part but the head), or full module names under the
    part, with * for any part of a name: `model.layers.*.self_attn.q_proj`.
    """

    lr: float
    tuner: Literal["lora"] = "lora"
    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    penalty: PenaltyOptions | None = None

    def check(self, fault: Report) -> None:
        check_lora(self, fault)
        if self.penalty and self.penalty.modules == "pruned":
            fault("penalty.modules", "nothing is pruned by this tuner", "Use modules: all.")

    def make(self) -> LoraTuner:
        return LoraTuner(self)


def check_lora(options: Any, fault: Report) -> None:
    """The faults of the fields that all LoRA tuners share."""
    if options.lr < 0:
        fault("lr", f"expected 0 or more, found {options.lr}")
    if options.rank < 1:
        fault("rank", f"expected 1 or more, found {options.rank}")
    if options.alpha <= 0:
        fault("alpha", f"expected more than 0, found {options.alpha}")
    if not 0 <= options.dropout < 1:
        fault("dropout", f"expected 0 to below 1, found {options.dropout}")
    if isinstance(options.targets, str) and options.targets != "all-linear":
        fault("targets", f"expected all-linear or a list of module names, found '{options.targets}'")
    if options.targets == []:
        fault("targets", "an empty list: nothing would be tuned")


class LoraTuner(Tuner):
    """Attaches the adapter. `layers` maps a target's full name to its peft layer; `penalised` are the names
    of those that a penalty falls on.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self.part = ""
        self.layers: dict[str, Any] = {}
        self.penalised: list[str] = []

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        from mmtune.tuning.joined import UpdatePenalty

        self.part = part
        options = self.options
        core = model.core(part)
        core.requires_grad_(False)
        targets = find_targets(core, options.targets, f"tune.{part}.targets")
        layers: Any = {name: core.get_submodule(name) for name in targets}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        too_small = [name for name in targets if min(shapes[name]) < options.rank]
        if too_small:
            raise UserError(
                f"rank {options.rank} is more than {', '.join(too_small[:3])} can have "
                f"({' x '.join(map(str, shapes[too_small[0]]))})",
                where=f"tune.{part}.rank",
                mend=f"Lower it to {min(min(shapes[name]) for name in too_small)}, or name other targets.",
            )
        if options.penalty:
            self.penalised = options.penalty.select(targets, part)
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM" if part == "language" else None,
        )
        model.adapters[part] = get_peft_model(core, config)
        self.layers = {name: m for name, m in core.named_modules() if isinstance(m, LoraLayer)}
        if sorted(self.layers) != sorted(targets):
            raise RuntimeError(f"peft adapted {sorted(self.layers)}, asked for were {targets}")
        if options.penalty:
            self.weight_penalty = UpdatePenalty(
                options.penalty, self.penalised, self.pair, self.frozen_weight, options.alpha / options.rank
            )
            self.weight_penalty.watch({name: self.layers[name] for name in self.penalised}, part)
        return self._rows(part, core)

    def pair(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A (r x q) and B (p x r) of a target."""
        layer = self.layers[name]
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def frozen_weight(self, name: str) -> torch.Tensor:
        """W (p x q) of a target."""
        return self.layers[name].get_base_layer().weight

    def update_norms(self) -> dict[str, float]:
        """||(alpha / r) B A||_F: of all modules together (`update_norm_PART`), and of the one where it is
        largest (`update_norm_max_PART`).
        """
        import torch

        from mmtune.tuning.joined import bundles

        factor = self.options.alpha / self.options.rank
        squares = []
        for names in bundles({name: sum(p.numel() for p in self.pair(name)) for name in self.layers}):
            wholes = self.shards.wholes([p for name in names for p in self.pair(name)])
            for a, b in zip(wholes[::2], wholes[1::2], strict=True):
                squares.append(((b.T @ b) * (a @ a.T)).sum())  # ||B A||^2, without B A
        found = (torch.stack(squares).double().clamp_min(0) * factor**2).cpu()
        return {
            f"update_norm_{self.part}": float(found.sum().sqrt()),
            f"update_norm_max_{self.part}": float(found.max().sqrt()),
        }

    def _rows(self, part: str, core: nn.Module) -> list[Row]:
        pruned = self.options.tuner == "lorasculpt"
        sizes = {name: sum(map(entries, own)) for name, own in own_parameters(core)}
        rows = []
        for name in self.layers:
            trained = sum(p.numel() for p in self.pair(name))
            total = sum(size for inside, size in sizes.items() if f"{inside}.".startswith(f"{name}."))
            rows.append(
                Row(
                    part,
                    name,
                    self.options.tuner,
                    total,
                    trained,
                    self.options.lr,
                    pruned,
                    name in self.penalised,
                )
            )
        adapted = tuple(f"{name}." for name in self.layers)
        for name, size in sizes.items():
            if not f"{name}.".startswith(adapted):
                rows.append(Row(part, name, "frozen", size, 0))
        return rows


def find_targets(core: nn.Module, wanted: str | list[str], where: str) -> list[str]:
    """The full names of the linear layers that are meant. Raises UserError for a name that matches none."""
    from torch import nn

    linear = [name for name, module in core.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("this part has no linear layer to adapt", where=where)
    if isinstance(wanted, str):
        head = getattr(core, "get_output_embeddings", lambda: None)()
        inner = [name for name in linear if core.get_submodule(name) is not head]
        if not inner:
            raise UserError("this part has no linear layer to adapt but its head", where=where)
        stacks = [name for name, p in core.named_parameters() if p.ndim == 3 and min(p.shape) > 1]
        if stacks:
            raise UserError(
                f"{len(stacks)} weights are stacks of matrices, such as {stacks[0]}, and no linear layers: "
                "all-linear would leave them out",
                where=where,
                mend=f"Name the targets you mean, for example {re.sub(r'[.][0-9]+[.]', '.*.', inner[0])}.",
            )
        return inner
    return matching(linear, wanted, "linear layer of this part", where)

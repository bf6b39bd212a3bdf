"""mmtune check --language: can mmtune give sight to a causal language model? It is loaded and tried.

That is: what the model computes, its embeddings and tokens, how a conversation is written, and what a LoRA
would land on.
"""

from __future__ import annotations

import math
import re

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.errors import Fault, UserError
from mmtune.data.batches import Example
from mmtune.data.chat import IMAGE, Chat, Turn
from mmtune.evaluation.generate import best_device
from mmtune.parts.attention import IMPLEMENTATIONS, attention_for
from mmtune.parts.language import LanguageModel
from mmtune.parts.loading import torch_dtype
from mmtune.parts.outline import count
from mmtune.parts.proof import Found, prove
from mmtune.training.check import show
from mmtune.tuning.lora import find_targets

ROUND = [Turn("user", f"{IMAGE}\nWhich colour is it?"), Turn("assistant", "Blue")]


def check_language(weights: str, chat: str, dtype: str) -> None:
    """Prints what was found. weights: a folder or hub name. Raises UserError with all that is wrong."""
    console = Console(highlight=False)
    language = LanguageModel.load(weights, None, torch_dtype(dtype)).to(best_device()).eval()
    attention = attention_for(language, "auto", torch_dtype(dtype))
    language.attend_by(IMPLEMENTATIONS[attention])
    faults = []
    for said in (*_described(language), f"attention: {attention}, on this machine"):
        console.print(said, markup=False, soft_wrap=True)
    proofs = prove(language)
    console.print(_table(proofs))
    faults += [
        Fault(f"{each.what} differ by {each.difference:.1e} of the largest", weights)
        for each in proofs
        if not each.sound
    ]
    for tell in (_conversation, _targets):
        try:
            for line in tell(language, chat, console.is_terminal):
                console.print(line, markup=False, soft_wrap=True)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError.of(faults)


def _described(language: LanguageModel) -> list[str]:
    hf, tokenizer = language.hf, language.tokenizer
    embeddings, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    spare = embeddings.num_embeddings - len(tokenizer)
    limit = language.context
    longest = f"up to {limit:,} tokens" if limit < math.inf else "no longest context in its config"
    tied = "tied to the embeddings" if head.weight is embeddings.weight else "its own matrix"
    return [
        f"{hf.config.model_type}: {count(hf):,} parameters, {len(language.layers())} layers, "
        f"{language.width:,} wide, {longest}",
        f"embeddings: {embeddings.num_embeddings:,}, of them {spare:,} without a token; the head is {tied}"
        + (", with a bias" if getattr(head, "bias", None) is not None else ""),
    ]


def _table(proofs: list[Found]) -> Table:
    table = Table(title="The model, and what mmtune takes it for", box=box.SIMPLE_HEAD)
    for heading in ("compared", "difference", "at most", ""):
        table.add_column(heading, justify="left" if heading == "compared" else "right")
    for each in proofs:
        said = "same" if each.sound else "NOT THE SAME"
        table.add_row(each.what, f"{each.difference:.1e}", f"{each.tolerance:.0e}", said)
    return table


def _conversation(language: LanguageModel, format: str, colours: bool) -> list[object]:
    chat = Chat(language.tokenizer, format, 1, language.context)
    ids, labels = chat.encode(ROUND)
    example = Example("", np.array(ids, np.int32), np.array(labels, np.int32), ())
    try:
        chat.encode([*ROUND, Turn("user", "And now?"), Turn("assistant", "Red")])
        rounds = "several rounds: yes"
    except UserError as error:
        rounds = f"several rounds: no, {error.faults[0].what}"
    return [f"chat format {format}:", show(example, chat, colours), rounds]


def _targets(language: LanguageModel, *_: object) -> list[str]:
    found = find_targets(language.hf, "all-linear", "all-linear")
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in found)
    return [f"all-linear: {len(found)} layers, {', '.join(kinds)}"]

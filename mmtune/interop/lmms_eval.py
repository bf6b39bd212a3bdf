"""mmtune's models in lmms-eval: `lmms-eval --model mmtune --model_args pretrained=DIR --tasks ...`.

What lmms-eval hands over and wants back follows its api/model.py and models/simple/llava_hf.py (0.7.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from mmtune.core.errors import UserError
from mmtune.data.batches import pad
from mmtune.data.chat import IMAGE, Turn
from mmtune.data.image import ImageTransform, load_image, upright_rgb
from mmtune.evaluation.generate import best_device, cut
from mmtune.evaluation.likelihood import Asked, likelihoods
from mmtune.parts.model import VisionLanguageModel

MOST_TOKENS = 1024  # of an answer, where a task says nothing: what lmms-eval's own LLaVA models take
# What a task may say of decoding without changing a greedy answer.
GREEDY: dict[str, tuple[Any, ...]] = {"do_sample": (False, None), "num_beams": (1, None)}
INDIFFERENT = {"until", "max_new_tokens", "temperature", "top_p", "top_k", "use_cache", "image_aspect_ratio"}


class MmtuneModel(lmms):
    """A model folder of mmtune, adapters included, as lmms-eval drives it.

    pretrained: the folder, such as runs/NAME/final. batch_size and device come from lmms-eval's command line.
    Answers are greedy. Raises UserError for what mmtune does not do: sampling, beams, videos, sounds.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch size '{batch_size}' is no number", mend="Say --batch_size 16, or fewer.")
        self.batch_size = int(batch_size)
        self.device = torch.device(device) if device else best_device()
        self.model = VisionLanguageModel.from_pretrained(pretrained, dtype=dtype).to(self.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the requests' order; each ends before the first of its task's `until` strings.

        Questions of several tasks share a batch where they end alike; the longest come first.
        """
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_ends(request.args[1], request.task_name), []).append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="mmtune", disable=self.rank != 0) as bar:
            for (most, until), numbers in alike.items():
                numbers.sort(key=lambda number: -len(requests[number].args[0]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    texts = self._answer([requests[number] for number in batch], most, until)
                    answers |= dict(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance], most: int, until: Sequence[str]) -> list[str]:
        asked = [self._asked(request) for request in requests]
        prompts = [self.model.chat.prompt(each.turns) for each in asked]
        for each, ids in zip(asked, prompts, strict=True):
            if len(ids) >= self.model.chat.context:
                raise UserError(
                    f"{len(ids)} tokens are asked, the model's context has {self.model.chat.context}",
                    where=each.id,
                    mend="Take a model with a longer context.",
                )
        batch = pad(prompts, self.model.language.pad_id, left=True)
        batch.images = torch.cat([each.pictures for each in asked])
        produced = self.model.generate(batch.to(self.device), most, until)
        texts = [str(self.model.language.tokenizer.decode(ids, skip_special_tokens=True)) for ids in produced]
        return [cut(text, until).strip() for text in texts]

    def _asked(self, request: Instance) -> Asked:
        """What is asked, with its pictures. A task that places none of them itself has them before its text.

        options: the continuation, where one is to be judged; the chat format writes the space before it.
        """
        context, said, doc_to_visual, doc_id, task, split = request.args
        where, doc = f"task {task}, document {doc_id}", self.task_dict[task][split][doc_id]
        pictures = [_picture(visual) for visual in doc_to_visual(doc) or []]
        text = context if IMAGE in context else f"{IMAGE}\n" * len(pictures) + context
        if text.count(IMAGE) != len(pictures):
            raise UserError(f"{text.count(IMAGE)} times {IMAGE} for {len(pictures)} pictures", where=where)
        judged = [] if isinstance(said, dict) else [said if isinstance(said, str) else said(doc)]
        options = [str(continuation).strip() for continuation in judged]
        return Asked(where, [Turn("user", text)], options, _stack(pictures, self.model.transform))

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each continuation (-log p, whether greedy decoding would give it); lmms-eval takes the least.

        A continuation is a whole answer, its end token included, as `mmtune eval --decode likelihood` counts.
        """
        if any(len(request.args) != 6 for request in requests):
            raise UserError("continuations without a question (acc_mutual_info) are not supported")
        found: list[GenerationResult] = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="mmtune", disable=self.rank != 0):
            asked = [self._asked(request) for request in requests[start : start + self.batch_size]]
            judged = likelihoods(self.model, asked, self.batch_size)
            # Wrapped, for lmms-eval 0.7.3 makes a string of a bare tuple.
            found += [GenerationResult((-option.total, option.greedy)) for (option,) in judged]
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("mmtune answers one turn at a time: no generate_until_multi_round tasks")


def _ends(said: dict[str, Any], task: str) -> tuple[int, tuple[str, ...]]:
    """Where a task's answers end: (max_new_tokens, until). Raises UserError where they are not greedy."""
    for name, value in said.items():
        if name not in INDIFFERENT and value not in GREEDY.get(name, ()):
            known = name in GREEDY
            raise UserError(
                f"{name}={value}" + (": mmtune decodes greedily" if known else " is unknown to mmtune"),
                where=f"task {task}, generation_kwargs",
                mend=f"Overrule it: --gen_kwargs {name}={GREEDY[name][0]}." if known else "",
            )
    if said.get("temperature") and said.get("do_sample") is not False:
        raise UserError(
            f"temperature {said['temperature']}: mmtune decodes greedily",
            where=f"task {task}, generation_kwargs",
            mend="Overrule it: --gen_kwargs temperature=0.",
        )
    until = said.get("until") or []
    return int(said.get("max_new_tokens") or MOST_TOKENS), tuple([until] if isinstance(until, str) else until)


def _picture(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return upright_rgb(visual)
    if isinstance(visual, str | Path) and Path(visual).suffix.lower() in Image.registered_extensions():
        return load_image(Path(visual))
    raise UserError(f"a task shows {type(visual).__name__} {str(visual)[:60]}: mmtune takes pictures alone")


def _stack(pictures: Sequence[Image.Image], transform: ImageTransform) -> torch.Tensor:
    """Pictures as uint8 [n, 3, S, S]; n may be 0."""
    if not pictures:
        return torch.empty(0, 3, transform.size, transform.size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([transform(picture) for picture in pictures]))

"""One file per official scorer, all free of torch; `FORMATS` names the annotation formats they read."""

from mmtune.core.table import Table
from mmtune.evaluation.metrics import (
    captions,
    classification,
    exact,
    gqa,
    iconqa,
    ocrvqa,
    okvqa,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqa,
    vqav2,
)

__all__ = [
    "FORMATS",
    "captions",
    "classification",
    "exact",
    "gqa",
    "iconqa",
    "ocrvqa",
    "okvqa",
    "pope",
    "scienceqa",
    "textvqa",
    "vizwiz",
    "vqa",
    "vqav2",
]

# Each entry is a module: read(path, **options) -> questions, RULES (name -> rule), METRIC; and, where it has
# them, UNIT (of a point, by default "%"), also(questions, predictions, rule, scores) -> further figures, and
# warn(questions, predictions) -> what has to be said beside the score; files(path, **options) -> what else is
# read.
FORMATS = Table(
    "annotation format",
    {
        "textvqa": "mmtune.evaluation.metrics:textvqa",
        "okvqa": "mmtune.evaluation.metrics:okvqa",
        "vqav2": "mmtune.evaluation.metrics:vqav2",
        "vizwiz": "mmtune.evaluation.metrics:vizwiz",
        "iconqa": "mmtune.evaluation.metrics:iconqa",
        "gqa": "mmtune.evaluation.metrics:gqa",
        "ocrvqa": "mmtune.evaluation.metrics:ocrvqa",
        "scienceqa": "mmtune.evaluation.metrics:scienceqa",
        "pope": "mmtune.evaluation.metrics:pope",
        "captions": "mmtune.evaluation.metrics:captions",
        "classification": "mmtune.evaluation.metrics:classification",
        "llava_jsonl": "mmtune.evaluation.metrics:exact",
    },
)

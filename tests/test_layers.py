"""Each room imports only from rooms above it, and a file only from files above it in its room's list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mmtune"

# From the ground floor up. A file may import any file that stands before it.
ORDER = """
core.errors core.processes core.files core.table core.config core.versions
data.chat data.shards data.image data.samples data.sharding data.batches data.cards
data.tiny data.tiny_tokenizer
parts.foreign parts.spec parts.known parts.fingerprint parts.loading
parts.vision.base parts.vision.pixels parts.vision.hf parts.vision.clip parts.vision.siglip
parts.vision.siglip2 parts.vision.dinov2 parts.vision.dinov3
parts.vision.stored parts.vision.open_clip_names parts.vision.open_clip parts.vision.timm
parts.connector.base parts.connector.linear parts.connector.mlp
parts.connector.pixel_shuffle parts.connector.resampler
parts.quantized parts.language parts.proof parts.attention parts.shapes parts.model parts.outline
parts.between parts.assembly parts.adapters
tuning.shards tuning.fsdp_shards tuning.zero_shards tuning.base tuning.penalty_triton tuning.penalty
tuning.segments tuning.importance tuning.joined
tuning.frozen tuning.full tuning.lora tuning.sculpt tuning.kl
evaluation.metrics.base evaluation.metrics.repair
evaluation.metrics.ptb evaluation.metrics.coco_java evaluation.metrics.captions
evaluation.metrics.vqa evaluation.metrics.textvqa evaluation.metrics.vqav2 evaluation.metrics.okvqa
evaluation.metrics.vizwiz evaluation.metrics.iconqa evaluation.metrics.exact
evaluation.metrics.classification
evaluation.metrics.gqa evaluation.metrics.ocrvqa evaluation.metrics.scienceqa evaluation.metrics.pope
evaluation.metrics evaluation.score evaluation.question_files evaluation.protocol
evaluation.likelihood evaluation.generate
evaluation.unfinished evaluation.restore evaluation.variant evaluation.results evaluation.divergence
evaluation.evaluate
evaluation.significance
evaluation.forgetting
evaluation.differences
evaluation.folders
evaluation.attribution evaluation.scales evaluation.answers
evaluation.terminal evaluation.frontier evaluation.examples evaluation.thumbnails evaluation.browser
evaluation.provenance evaluation.page evaluation.report
evaluation.compare
evaluation.sequences
evaluation.analyse evaluation.analysis_picture
prepare.originals prepare.pictures prepare.training prepare.composed prepare.converted prepare.released
prepare.dataset
training.zero_json run
training.folder training.plan training.optim training.engine training.fsdp training.zero training.checkpoint
training.meter training.signals
training.probe training.loop training.rehearsal training.memory training.check
training.check_language
interop.lmms_eval interop.comparison interop.merged interop.part_export
interop.weights interop.source interop.chat_templates interop.llava_hf
interop.llava_forward interop.llava interop.importing
interop.llava_hf_processor interop.llava_hf_export interop.llava_export interop.peft_export
experiments.estimate experiments.runs experiments.sweep
experiments.swap_options experiments.fit_connector experiments.swap_picture experiments.swap_words
experiments.swap_page experiments.swap_report experiments.swap_shapes experiments.swap_tower
bench.generate bench.score bench.penalty bench.train
commands cli __main__
""".split()


def imports(path: Path) -> set[str]:
    """The mmtune modules a file imports, wherever in the file; those for type checking alone don't count."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmtune."):
            module = node.module.removeprefix("mmtune.")
            inside = {f"{module}.{alias.name}" for alias in node.names} & set(ORDER)
            found.update(inside or {module})
        if isinstance(node, ast.Import):
            found.update(a.name.removeprefix("mmtune.") for a in node.names if a.name.startswith("mmtune."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def files() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py" or path.parent.name == "metrics":
            relative = path.relative_to(PACKAGE).with_suffix("")
            names.append(".".join(relative.parts).removesuffix(".__init__"))
    return names


def test_every_file_has_its_place() -> None:
    assert sorted(files()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_what_stands_before_it(name: str) -> None:
    path = PACKAGE / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    known = set(ORDER[: ORDER.index(name)])
    for imported in imports(path):
        if imported == "parts":  # the package's face, which stands for parts.model
            imported = "parts.model"
        assert imported in known, f"{name} imports {imported}, which does not stand before it"

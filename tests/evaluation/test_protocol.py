from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol, load_suite, task_names

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = Question(
    "7", "How many?", ("two",), "test/choose_txt/7/image.png", "7", choices=("one", "two"), ocr=("STOP", "2")
)


@pytest.mark.parametrize("task", task_names())
def test_every_protocol_can_be_asked(task: str) -> None:
    protocol = load_protocol(task)
    assert protocol.task == task
    for split in protocol.annotations:
        assert "{" not in str(protocol.for_split(split).options.get("split", ""))
    (turn,) = protocol.turns(QUESTION)
    assert turn.role == "user"
    assert turn.text.startswith("<image>\nHow many?" if "{question}" in protocol.prompt else "<image>\n")
    assert "{" not in turn.text


@pytest.mark.parametrize("task", [name for name in task_names() if not name.startswith("tiny_")])
def test_the_documentation_says_where_the_files_lie(task: str) -> None:
    protocol = load_protocol(task)
    lines = (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if f"`{task}`" in line and "`datasets/" in line]
    assert f"`{protocol.root}`" in row
    assert f"`{protocol.annotations[protocol.report_split]}`" in row


def test_prompts_are_those_of_the_benchmarks() -> None:
    """LLaVA-1.5's prompt for short answers; the released LoRASculpt scripts' one for IconQA."""
    short = "Answer the question using a single word or phrase."
    assert load_protocol("textvqa").turns(QUESTION)[0].text == f"<image>\nHow many?\n{short}"
    letters = "A. one\nB. two\nAnswer with the option's letter from the given choices directly."
    assert load_protocol("iconqa_choose_txt").turns(QUESTION)[0].text == f"<image>\nHow many?\n{letters}"
    assert load_protocol("gqa").turns(QUESTION)[0].text == f"<image>\nHow many?\n{short}"
    hinted = replace(QUESTION, context="There are few.")
    context = "Context: There are few.\n"
    assert load_protocol("scienceqa").turns(hinted)[0].text == f"<image>\n{context}How many?\n{letters}"
    assert load_protocol("scienceqa").turns(QUESTION)[0].text == f"<image>\nHow many?\n{letters}"
    without = replace(QUESTION, image=None)
    assert load_protocol("scienceqa").turns(without)[0].text == f"How many?\n{letters}"
    assert load_protocol("tiny_text").turns(without)[0].text == "How many?\nAnswer briefly."


def test_options_that_are_pictures_stand_where_they_are_shown() -> None:
    question = replace(QUESTION, choice_images=("a.png", "b.png"))
    [turn] = load_protocol("iconqa_choose_img").turns(question)
    assert turn.text.startswith("<image>\nHow many?\nA. <image>\nB. <image>\nAnswer with the option's letter")
    for prompt, shown in (("{question}", 0), ("{options} {options}", 4)):
        with pytest.raises(UserError, match=f"question 7: {shown} of its options' 2 pictures") as caught:
            replace(load_protocol("iconqa_choose_img"), prompt=prompt).turns(question)
        assert "{options}, once" in str(caught.value)
    for wrong in (replace(QUESTION, text="<image> two?"), replace(question, choices=("one", "<image>"))):
        with pytest.raises(UserError, match="question 7: its text holds <image>"):
            load_protocol("iconqa_choose_img").turns(wrong)


def test_braces_in_a_question_stay() -> None:
    question = replace(QUESTION, text="What is {x}?")
    assert "What is {x}?" in load_protocol("textvqa").turns(question)[0].text


def test_the_hash_is_of_what_decides_the_score() -> None:
    protocol = load_protocol("tiny_iconqa")
    assert protocol.hash == load_protocol("tiny_iconqa").hash
    assert len(protocol.hash) == 16
    assert replace(protocol, root=Path("/elsewhere")).hash == protocol.hash
    assert replace(protocol, about="Something else.").hash == protocol.hash
    assert replace(protocol, report_split="val").hash == protocol.hash
    changes = (
        {"prompt": protocol.prompt + " "},
        {"rule": "letter"},
        {"max_new_tokens": 17},
        {"options": {"task": "choose_img", "split": "{split}"}},
        {"annotations": {"test": "other.json"}},
        {"stop": ["\n"]},
        {"decode": "likelihood"},
        {"options_as": "text"},
    )
    hashes = {replace(protocol, **change).hash for change in changes}
    assert len(hashes | {protocol.hash}) == 1 + len(changes)


def test_the_hash_of_a_protocol_stays_what_it_was() -> None:
    """Results of an older mmtune can be compared as long as what they say of their protocol still holds."""
    hashes = {"tiny_iconqa": "8d73a1f43abe7bc6", "tiny_letters": "67b544b12738aba7"}
    assert {task: load_protocol(task).hash for task in hashes} == hashes


def test_protocols_hash_apart() -> None:
    assert len({load_protocol(task).hash for task in task_names()}) == len(task_names())


@pytest.mark.parametrize("task", ["tiny_colour", "tiny_iconqa", "tiny_reading", "tiny_text"])
def test_questions_of_the_tiny_world(world: Path, task: str) -> None:
    root = world / "datasets" / "tiny"
    protocol = load_protocol(task)
    found = {split: protocol.questions(split, root) for split in ("val", "test")}
    for split, (questions, file) in found.items():
        assert file.is_file()
        assert len(questions) == (5 if split == "val" else 12)
        for question in questions:
            assert (question.image is None) == (task == "tiny_text")
            assert question.image is None or (root / protocol.images / question.image).is_file()
    ids = [{question.id for question in questions} for questions, _ in found.values()]
    assert not ids[0] & ids[1]


def test_faults_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'tiny_color'") as caught:
        load_protocol("tiny_color")
    assert "tiny_colour" in str(caught.value)
    with pytest.raises(UserError, match="no split 'train'") as caught:
        load_protocol("tiny_colour").questions("train", tmp_path)
    assert "test, val" in str(caught.value)
    with pytest.raises(UserError, match="no such annotation file") as caught:
        load_protocol("textvqa").questions("val", tmp_path)
    assert str(tmp_path / "TextVQA_0.5.1_val.json") in str(caught.value)
    with pytest.raises(UserError, match="unknown suite 'tny'") as caught:
        load_suite("tny")
    assert "tiny" in str(caught.value)


def test_a_folder_of_problems_as_annotations(world: Path, tmp_path: Path) -> None:
    """IconQA's problem folders without problems.json; what is in each is part of the hash of the data."""
    problem = {"question": "How many?", "choices": ["1", "2"], "answer": 1, "ques_type": "choose_txt"}
    for pid in ("7", "12"):
        (tmp_path / "choose_txt" / pid).mkdir(parents=True)
        (tmp_path / "choose_txt" / pid / "data.json").write_text(json.dumps(problem))
    protocol = replace(
        load_protocol("iconqa_choose_txt"), annotations={"test": "choose_txt"}, images="choose_txt"
    )
    questions, _ = protocol.questions("test", tmp_path)
    assert [question.image for question in questions] == ["7/image.png", "12/image.png"]
    files = protocol.files("test", tmp_path)
    assert [file.relative_to(tmp_path).parts[1:] for file in files] == [
        ("12", "data.json"),
        ("7", "data.json"),
    ]
    with pytest.raises(UserError, match="this is a folder"):
        replace(load_protocol("textvqa"), annotations={"val": "choose_txt"}).questions("val", tmp_path)


@pytest.mark.parametrize(
    ("task", "beside"),
    [
        ("iconqa_choose_txt", ["pid_splits.json"]),
        ("scienceqa", ["pid_splits.json"]),
        ("pope", ["coco/coco_pope_popular.json", "coco/coco_pope_adversarial.json"]),
    ],
)
def test_all_files_that_decide_the_questions_are_in_the_hash_of_the_data(
    tmp_path: Path, task: str, beside: list[str]
) -> None:
    protocol = load_protocol(task)
    names = [protocol.annotations["test"], *beside]
    for name in (*names, "else.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert protocol.files("test", tmp_path) == [tmp_path / name for name in names]


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsource: [tiny_text]\ntarget: [tiny_place]\n")
    assert load_suite(str(file)).source == ["tiny_text"]
    file.write_text("name: mine\nsource: [tiny_text, tiny_txt]\ntarget: [tiny_place]\n")
    with pytest.raises(UserError, match="unknown task 'tiny_txt'") as caught:
        load_suite(str(file))
    assert "source.1" in str(caught.value)


PROTOCOL = """
task: mine
about: Nothing.
format: llava_jsonl
rule: exact
prompt: "{question}"
max_new_tokens: 4
root: .
annotations: {test: questions.jsonl}
"""


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("{question}", "{qestion}", "prompt: unknown placeholder {qestion}\n    Did you mean 'question'?"),
        ("{question}", "{question} {}", "prompt: unknown placeholder {}"),
        ("{question}", "{question", "prompt: its braces don't match"),
        ("{question}", "{question} {ocr}", "prompt: {ocr} is asked, but no file of OCR tokens is named"),
        (
            'format: llava_jsonl\nrule: exact\nprompt: "',
            'format: textvqa\nrule: m4c\nprompt: "{options} ',
            "its {options} ask for a letter, but the rule 'm4c' makes nothing of the letter A",
        ),
        ("root: .", "root: .\nquestion_files: {test: q.jsonl}", "'question_files', and both are given"),
        ('prompt: "{question}"\n', "", "'question_files', and neither is given"),
        (
            'prompt: "{question}"',
            "question_files: {val: q.jsonl}",
            "question_files: there is none of the reporting split 'test'",
        ),
        ("root: .", "root: .\nexpect: {tset: 4}", "expect.tset: there are no annotations of this split"),
        (
            "{test: questions.jsonl}",
            "{val: questions.jsonl}",
            "no annotations of split 'test'\n    Known: val.",
        ),
        ("task: mine", "task: other", "calls itself 'other', but its file is named mine.yaml"),
    ],
)
def test_a_faulty_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, fault: str
) -> None:
    monkeypatch.setattr("mmtune.evaluation.protocol.share", lambda kind: tmp_path)
    (tmp_path / "mine.yaml").write_text(PROTOCOL)
    assert load_protocol("mine").prompt == "{question}"
    (tmp_path / "mine.yaml").write_text(PROTOCOL.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_protocol("mine")
    assert fault in str(caught.value)


def test_a_protocol_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "any_name.yaml"
    file.write_text(PROTOCOL)
    assert load_protocol(str(file)).task == "mine"
    for old, new, fault in (
        (
            "task: mine",
            "task: textvqa",
            "line 2, task: it calls itself 'textvqa', which is a task of mmtune's",
        ),
        ("task: mine", "task: my/task", "line 2, task: 'my/task' is no name"),
        ("rule: exact", "rule: m4c", "line 5, rule: unknown rule 'm4c'"),
    ):
        file.write_text(PROTOCOL.replace(old, new))
        with pytest.raises(UserError, match=f"{file}, {fault}"):
            load_protocol(str(file))
    with pytest.raises(UserError, match=r"no\.yaml: no such file"):
        load_protocol(str(tmp_path / "no.yaml"))
    shipped = load_protocol("textvqa")
    assert load_protocol(str(share("eval") / "textvqa.yaml")) == shipped


def test_a_suite_of_ones_own_tasks(tmp_path: Path) -> None:
    own = tmp_path / "any_name.yaml"
    own.write_text(PROTOCOL)
    file = tmp_path / "suite.yaml"
    file.write_text(f"name: both\nsource: [tiny_text, {own}]\ntarget: [tiny_place]\n")
    suite = load_suite(str(file))
    assert (suite.source, suite.target) == (["tiny_text", "mine"], ["tiny_place"])
    assert suite.tasks == ["tiny_text", "mine", "tiny_place"]
    assert [load_protocol(task).task for task in suite.given] == suite.tasks
    file.write_text(f"name: both\nsource: [{own}]\ntarget: [{own}]\n")
    with pytest.raises(UserError, match=r"target\.0: task 'mine' is given twice"):
        load_suite(str(file))
    own.write_text(PROTOCOL.replace("rule: exact", "rule: m4c"))
    with pytest.raises(UserError, match=rf"suite\.yaml, line 2, source\.0: {own}.*unknown rule 'm4c'"):
        load_suite(str(file))


def test_each_task_has_a_split_of_its_own_to_report() -> None:
    splits = {task: load_protocol(task).report_split for task in task_names()}
    hidden = {"textvqa", "textvqa_ocr", "okvqa", "vqav2", "vizwiz"}  # their test answers are not public
    assert {splits.pop(task) for task in hidden} == {"val"}
    assert splits.pop("gqa") == "testdev"
    assert set(splits.values()) <= {"test"}


@pytest.mark.parametrize(
    ("tasks", "fault"),
    [
        ("source: []\ntarget: [tiny_place]", "source: an empty list"),
        ("source: [tiny_text]\ntarget: []", "target: an empty list"),
        ("source: [tiny_text]\ntarget: [tiny_text]", "target.0: task 'tiny_text' is given twice"),
    ],
)
def test_a_faulty_suite(tmp_path: Path, tasks: str, fault: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{tasks}\n")
    with pytest.raises(UserError) as caught:
        load_suite(str(tmp_path / "mine.yaml"))
    assert fault in str(caught.value)


def test_a_suite_bears_the_name_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "one.yaml").write_text("name: two\nsource: [tiny_text]\ntarget: [tiny_place]\n")
    for task in ("tiny_text", "tiny_place"):
        (tmp_path / f"{task}.yaml").touch()
    monkeypatch.setattr("mmtune.evaluation.protocol.share", lambda kind: tmp_path)
    with pytest.raises(UserError, match=r"calls itself 'two', but its file is named one\.yaml"):
        load_suite("one")


@pytest.mark.parametrize("name", sorted(path.stem for path in (share("eval") / "suites").glob("*.yaml")))
def test_every_suite_can_be_loaded(name: str) -> None:
    suite = load_suite(name)
    assert suite.given == suite.tasks and set(suite.tasks) <= set(task_names())


def test_the_forgetting_suites_have_lorasculpts_upstream_sets() -> None:
    for name, target in (("forgetting", "iconqa_choose_txt"), ("forgetting_coco", "coco_caption")):
        assert load_suite(name).source == ["okvqa", "ocrvqa", "gqa", "textvqa"]
        assert load_suite(name).target == [target]


def test_the_tiny_suite_is_five_and_one() -> None:
    suite = load_suite("tiny")
    assert len(suite.source) == 5
    assert suite.target == ["tiny_iconqa"]

"""YAML and overrides into dataclasses: every fault at once, each with its file, line and key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.core.config import Source, chosen_by, leaves, parse, parse_named, presets_in, to_dict
from mmtune.core.errors import UserError
from mmtune.core.table import Table


@dataclass
class Plain:
    """A tool without options but one."""

    tool: Literal["plain"] = "plain"
    size: int = 1


@dataclass
class Fancy:
    """A tool with a required option."""

    rate: float
    tool: Literal["fancy"] = "fancy"
    targets: str | list[str] = "all"

    def check(self, fault: Callable[..., None]) -> None:
        if self.rate < 0:
            fault("rate", f"expected 0 or more, found {self.rate}", "Raise it.")


TOOLS = Table("tool", {"plain": f"{__name__}:Plain", "fancy": f"{__name__}:Fancy"})


@dataclass
class Inner:
    """One entry of a list."""

    path: Path
    limit: int | None = None


@dataclass
class Outer:
    """A bit of everything."""

    name: str
    seed: int = 0
    rate: float = 0.1
    either: int | float = 1
    fit: Literal["pad", "crop"] = "pad"
    on: bool = True
    data: list[Inner] = field(default_factory=list)
    tool: Any = field(default_factory=Plain, metadata=chosen_by("tool", TOOLS, "plain"))
    strict: Any = field(default_factory=Plain, metadata=chosen_by("tool", TOOLS))
    free: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def _parse(folder: Path, text: str, *overrides: str) -> Outer:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse(Outer, Source(path, list(overrides)))


def _faults(folder: Path, text: str, *overrides: str) -> list[tuple[str, str, str]]:
    """(where without the folder, what, mend) of each fault."""
    with pytest.raises(UserError) as caught:
        _parse(folder, text, *overrides)
    return [(f.where.replace(f"{folder}/", ""), f.what, f.mend) for f in caught.value.faults]


# --- what is right -------------------------------------------------------------------------------------


def test_defaults(tmp_path: Path) -> None:
    assert _parse(tmp_path, "name: a") == Outer("a")


def test_a_whole_config(tmp_path: Path) -> None:
    made = _parse(
        tmp_path,
        """
        name: a
        rate: 2e-4
        either: 3
        fit: crop
        on: false
        data:
          - {path: x/y.json, limit: 5}
          - path: z.json
        tool: {tool: fancy, rate: 1, targets: [q, v]}
        strict: {tool: plain, size: 7}
        free: {layers: 2, deep: {lr: 1e-5}}
        counts: {a: 1}
        """,
    )
    assert made == Outer(
        name="a",
        rate=2e-4,
        either=3,
        fit="crop",
        on=False,
        data=[Inner(Path("x/y.json"), 5), Inner(Path("z.json"))],
        tool=Fancy(1.0, targets=["q", "v"]),
        strict=Plain(size=7),
        free={"layers": 2, "deep": {"lr": 1e-5}},
        counts={"a": 1},
    )
    assert isinstance(made.rate, float)
    assert isinstance(made.tool.rate, float)


@pytest.mark.parametrize(
    "text", ["2e-4", "2E-4", "2.0e-4", "+2e-04", "0.2e-3", ".2e-3", "0.0002", "20e-5", "2.e-4"]
)
def test_every_way_to_write_a_small_number(tmp_path: Path, text: str) -> None:
    assert _parse(tmp_path, f"name: a\nrate: {text}").rate == pytest.approx(2e-4, rel=1e-15)
    assert _parse(tmp_path, "name: a", f"rate={text}").rate == pytest.approx(2e-4, rel=1e-15)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=40)
def test_every_float_comes_back(folder: Path, value: float) -> None:
    assert _parse(folder, f"name: a\nrate: {value!r}").rate == value
    assert _parse(folder, "name: a", f"rate={value!r}").rate == value


@pytest.mark.parametrize("text", ["e5", "2e", "1e2x", "v1e5", "'2e-4'"])
def test_text_stays_text(tmp_path: Path, text: str) -> None:
    assert _parse(tmp_path, f"name: {text}").name == text.strip("'")


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("3.5", 3.5), ("1e2", 100.0)])
def test_a_union_keeps_whole_numbers_whole(tmp_path: Path, text: str, value: float) -> None:
    made = _parse(tmp_path, f"name: a\neither: {text}").either
    assert made == value
    assert type(made) is type(value)


# --- faults --------------------------------------------------------------------------------------------


def test_every_fault_at_once(tmp_path: Path) -> None:
    faults = _faults(
        tmp_path,
        "sede: 1\n"  # 1
        "rate: fast\n"  # 2
        "on: 1\n"  # 3
        "fit: corp\n"  # 4
        "data:\n"  # 5
        "  - path: a\n"  # 6
        "    limit: 1.5\n"  # 7
        "  - limit: 2\n"  # 8
        "tool: {tool: fance}\n"  # 9
        "strict:\n"  # 10
        "  tool: fancy\n"  # 11
        "  rate: -1\n"  # 12
        "counts: {a: x}\n",  # 13
        "seed=x",
    )
    assert sorted(faults) == sorted(
        [
            ("run.yaml, line 1, sede", "unknown key 'sede'", "Did you mean 'seed'?"),
            ("run.yaml, line 1", "'name' is missing", ""),
            ("command line, seed", "expected a whole number, found 'x'", ""),
            ("run.yaml, line 2, rate", "expected a finite number, found 'fast'", ""),
            ("run.yaml, line 3, on", "expected true or false, found 1", ""),
            ("run.yaml, line 4, fit", "expected one of pad, crop, found 'corp'", "Did you mean 'crop'?"),
            ("run.yaml, line 7, data.0.limit", "expected a whole number, found 1.5", ""),
            ("run.yaml, line 8, data.1", "'path' is missing", ""),
            ("run.yaml, line 9, tool.tool", "unknown tool 'fance'", "Did you mean 'fancy'?"),
            ("run.yaml, line 12, strict.rate", "expected 0 or more, found -1.0", "Raise it."),
            ("run.yaml, line 13, counts.a", "expected a whole number, found 'x'", ""),
        ]
    )


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    ((_, _, mend),) = _faults(tmp_path, "name: a\ndata: [{path: x, zzz: 1}]")
    assert mend == "Known: limit, path."


def test_a_key_given_twice(tmp_path: Path) -> None:
    assert _faults(tmp_path, "name: a\nseed: 1\nname: b\ntool:\n  size: 1\n  size: 2") == [
        ("run.yaml, line 3, name", "the key is given twice, first in line 1", "Keep one of the two."),
        ("run.yaml, line 6, tool.size", "the key is given twice, first in line 5", "Keep one of the two."),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("name: 3", "expected text, found 3"),
        ("name:", "expected text, found nothing"),
        ("seed: true", "expected a whole number, found True"),
        ("seed: 1.0", "expected a whole number, found 1.0"),
        ("seed: '1'", "expected a whole number, found '1'"),
        ("rate: .nan", "expected a finite number, found nan"),
        ("rate: .inf", "expected a finite number, found inf"),
        ("rate: 1e999", "expected a finite number, found inf"),
        (f"rate: 1{400 * '0'}", f"expected a finite number, found 1{400 * '0'}"),
        ("rate: true", "expected a finite number, found True"),
        ("either: x", "expected a whole number or a finite number, found 'x'"),
        ("fit: 3", "expected one of pad, crop, found 3"),
        ("data: {path: x}", "expected a list, found a mapping"),
        ("data: [x]", "expected a mapping, found 'x'"),
        ("data: [{path: 3}]", "expected a path, found 3"),
        ("data: [{path: ''}]", "expected a path, found ''"),
        ("tool: fancy", "expected a mapping, found 'fancy'"),
        ("tool: {tool: 3}", "unknown tool '3'"),
        ("tool: {tool: [a]}", "unknown tool '['a']'"),
        ("strict: {size: 2}", "'tool' is missing"),
        ("tool: {tool: fancy}", "'rate' is missing"),
        ("tool: {tool: fancy, rate: 1, targets: 3}", "expected text or a list, found 3"),
        ("tool: {tool: fancy, rate: 1, targets: [3]}", "expected text, found 3"),
        ("tool: {tool: plain, rate: 1}", "unknown key 'rate'"),
        ("free: 3", "expected a mapping, found 3"),
        ("seed: 2026-13-45", "'2026-13-45' is no value of YAML"),
        ("seed: !unknown x", "'x' is no value of YAML"),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path: Path, line: str, what: str) -> None:
    text = line if line.startswith("name") else f"name: a\n{line}"
    faults = _faults(tmp_path, text)
    assert faults[0][1] == what
    assert faults[0][0].startswith(f"run.yaml, line {1 + (text != line)}, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a", "line 1: expected a mapping, found a list"),
        ("a: [1\nb: 2", "line 2: not valid YAML"),
        ("a: 1\n\tb: 2", "line 2: not valid YAML"),
        ("a: 1\n---\nb: 2", "line 2: not valid YAML"),
        ("a: *b", "line 1: not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("name: a\nfree: &x {deep: *x}", "line 2, free.deep: .*inside itself"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"run\.yaml.*{message}"):
        _parse(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: no such file"):
        Source(tmp_path / "no.yaml")


# --- overrides -----------------------------------------------------------------------------------------

BASE = "name: a\nseed: 1\ndata:\n  - {path: x}\n  - {path: y, limit: 2}\n"


def test_overrides(tmp_path: Path) -> None:
    made = _parse(
        tmp_path,
        BASE,
        "seed=2",
        "name=b=c",
        "data.1.limit=null",
        "data.0.path=z",
        "tool.tool=fancy",
        "tool.rate=2e-4",
        "tool.targets=[q, v]",
        "free={layers: 2}",
        "free.width=8",
    )
    assert made == Outer(
        "b=c",
        2,
        data=[Inner(Path("z")), Inner(Path("y"))],
        tool=Fancy(2e-4, targets=["q", "v"]),
        free={"layers": 2, "width": 8},
    )


def test_a_list_is_replaced_as_a_whole_or_by_position(tmp_path: Path) -> None:
    assert _parse(tmp_path, BASE, "data=[{path: only}]").data == [Inner(Path("only"))]
    assert _parse(tmp_path, BASE, "data.1={path: new}").data == [Inner(Path("x")), Inner(Path("new"))]
    assert _parse(tmp_path, BASE, "data=[]").data == []


def test_a_mapping_is_read_as_in_a_file(tmp_path: Path) -> None:
    made = _parse(
        tmp_path, BASE, "tool={tool: fancy, rate: 1e-3, targets: [1e5x, '2e-4']}", "free={a: [1e-3]}"
    )
    assert made.tool == Fancy(1e-3, targets=["1e5x", "2e-4"])
    assert made.free == {"a": [1e-3]}


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert _parse(tmp_path, BASE, "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("seed", "command line", "'seed' is no override"),
        ("=3", "command line", "'=3' is no override"),
        ("seed=x", "command line, seed", "expected a whole number, found 'x'"),
        ("free.a=2026-13-45", "command line, free.a", "'2026-13-45' is no value of YAML"),
        ("free={a: 1, a: 2}", "command line, free.a", "the key is given twice"),
        ("sede=1", "command line, sede", "unknown key 'sede'"),
        ("tol.size=1", "command line, tol", "unknown key 'tol'"),
        ("tool.sise=1", "command line, tool.sise", "unknown key 'sise'"),
        ("data.2.limit=1", "command line, data.2.limit", "'2' is no position in this list of 2"),
        ("data.x=1", "command line, data.x", "'x' is no position in this list of 2"),
        ("data.1={limit: 3}", "command line, data.1", "'path' is missing"),
        ("data.1={path: a, limit: b}", "command line, data.1.limit", "expected a whole number, found 'b'"),
        ("data=[{path: 3}]", "command line, data.0.path", "expected a path, found 3"),
        ("seed.x=1", "command line, seed.x", "'seed' holds a plain value, so it has no 'x'"),
        ("name=[a", "command line, name", ""),
    ],
)
def test_faults_of_overrides(tmp_path: Path, override: str, where: str, what: str) -> None:
    if not what:
        assert _parse(tmp_path, BASE, override).name == "[a"
        return
    assert [(place, text) for place, text, _ in _faults(tmp_path, BASE, override)] == [(where, what)]


# --- there and back ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), max_size=8)
tools = st.builds(Plain, size=st.integers()) | st.builds(
    Fancy, rate=st.floats(0, 1e300), targets=st.just("all") | st.lists(texts, max_size=2)
)
outers = st.builds(
    Outer,
    name=texts,
    seed=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    either=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    fit=st.sampled_from(["pad", "crop"]),
    on=st.booleans(),
    data=st.lists(st.builds(Inner, path=st.just(Path("a/b")), limit=st.none() | st.integers()), max_size=2),
    tool=tools,
    strict=tools,
    free=st.none() | st.dictionaries(texts, st.integers() | texts, max_size=2),
    counts=st.dictionaries(texts, st.integers(), max_size=2),
)


@given(made=outers)
@settings(max_examples=60, deadline=None)
def test_to_dict_and_back(folder: Path, made: Outer) -> None:
    assert _parse(folder, yaml.safe_dump(to_dict(made), allow_unicode=True)) == made


def test_to_dict_is_plain() -> None:
    made = to_dict(Outer("a", data=[Inner(Path("x"))]))
    assert made["data"] == [{"path": "x"}]
    assert made["tool"] == {"tool": "plain", "size": 1}
    assert "free" not in made
    assert set(made) | {"free"} == {f.name for f in dataclasses.fields(Outer)}
    assert math.isclose(made["rate"], 0.1)


def test_leaves_by_their_dotted_keys() -> None:
    tree = {"seed": 0, "data": [{"path": "a"}, {"path": "b"}], "tune": {"lr": 1e-3, "targets": []}}
    assert leaves(tree) == {
        "seed": 0,
        "data.0.path": "a",
        "data.1.path": "b",
        "tune.lr": 1e-3,
        "tune.targets": [],
    }


# --- files by name -------------------------------------------------------------------------------------


def test_a_named_file_must_bear_its_name(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\nname: one\n")
    (tmp_path / "two.yaml").write_text("seed: 1\nname: one\n")
    assert parse_named(Outer, "tool", tmp_path, "one") == Outer("one", 1)
    with pytest.raises(UserError, match=r"two\.yaml, line 2, name: it calls itself 'one'"):
        parse_named(Outer, "tool", tmp_path, "two")
    with pytest.raises(UserError, match="unknown tool 'three'"):
        parse_named(Outer, "tool", tmp_path, "three")


@dataclasses.dataclass
class Bounded:
    steps: int = 1
    size: int = 1

    def check(self, fault: Callable[..., None]) -> None:
        for name in ("steps", "size"):
            if getattr(self, name) < 1:
                fault(name, f"{name} too small")
        if self.steps + self.size > 1:
            fault("", "too much in all")


def test_a_faulty_field_does_not_hide_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: ten\nsize: -3\n")
    with pytest.raises(UserError) as caught:
        parse(Bounded, Source(path))
    assert [fault.what for fault in caught.value.faults] == [
        "expected a whole number, found 'ten'",
        "size too small",
    ]


@dataclass
class Batches:
    """A check that looks at a required field on the way to others."""

    size: int
    micro: int = 1
    clip: float = 1.0

    def check(self, fault: Callable[..., None]) -> None:
        if self.size < 1:
            fault("size", "too small")
        if self.size % self.micro:
            fault("micro", "no divisor")
        if self.clip <= 0:
            fault("clip", "too small")
        if "," in f"{self.size:d}":  # what no stand-in can do
            fault("size", "a comma")
        if self.micro < 1:
            fault("micro", "too small")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{micro: 3, clip: 0}", ["'size' is missing", "too small"]),
        ("{size: x, micro: 3, clip: 0}", ["expected a whole number, found 'x'", "too small"]),
        ("{micro: 3}", ["'size' is missing"]),
        ("{size: 4, micro: 3, clip: 0}", ["no divisor", "too small"]),
    ],
)
def test_a_missing_field_hides_no_fault_of_another(tmp_path: Path, text: str, found: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(Batches, Source(path))
    assert [fault.what for fault in caught.value.faults] == found


def test_a_check_that_fails_though_no_field_is_missing_is_a_fault_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{size: 4, micro: 0}")
    with pytest.raises(ZeroDivisionError):
        parse(Batches, Source(tmp_path / "run.yaml"))


@pytest.fixture
def presets(tmp_path: Path) -> type:
    """A class whose presets lie in a folder."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "quick.yaml").write_text(
        "size: 3\ntool: {tool: fancy, rate: 0.5, targets: [a]}\ncounts: {a: 1, b: 2}\n"
    )
    (folder / "other.yaml").write_text("size: 4\n")

    @dataclass
    class Set:
        preset: str | None = field(default=None, metadata=presets_in(folder))
        size: int = 1
        tool: Any = field(default_factory=Plain, metadata=chosen_by("tool", TOOLS, "plain"))
        counts: dict[str, int] | None = None

    globals()["Set"] = Set
    return Set


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("preset: other", [], {"size": 4, "tool": {"tool": "plain", "size": 1}}),
        (
            "preset: quick",
            [],
            {"size": 3, "tool": {"rate": 0.5, "tool": "fancy", "targets": ["a"]}, "counts": {"a": 1, "b": 2}},
        ),
        (  # what is given comes first, key by key; a list is one value
            "preset: quick\ntool: {targets: [b, c]}",
            ["counts.b=5", "tool.rate=2"],
            {
                "size": 3,
                "tool": {"rate": 2.0, "tool": "fancy", "targets": ["b", "c"]},
                "counts": {"a": 1, "b": 5},
            },
        ),
        (
            "preset: quick\ntool: {tool: plain}\ncounts:",
            [],
            {"size": 3, "tool": {"tool": "plain", "size": 1}},
        ),
        ("preset:", [], {"size": 1, "tool": {"tool": "plain", "size": 1}}),
    ],
)
def test_a_preset_stands_where_nothing_is_given(
    presets: type, tmp_path: Path, text: str, overrides: list[str], expected: dict[str, Any]
) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(text + "\n")
    read = to_dict(parse(presets, Source(file, overrides)))
    assert read == expected
    file.write_text(yaml.safe_dump(read))
    assert to_dict(parse(presets, Source(file))) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("preset: quikc", "set.yaml, line 1, preset: unknown preset 'quikc'"),
        ("preset: [quick]", "unknown preset"),
        ("size: 2\npreset: quick\ntool: {rate: -1}", "set.yaml, line 3, tool.rate: expected 0 or more"),
        ("preset: quick\nsise: 2", "set.yaml, line 2, sise: unknown key 'sise'"),
    ],
)
def test_faults_beside_a_preset(presets: type, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "set.yaml"
    file.write_text(text + "\n")
    with pytest.raises(UserError) as raised:
        parse(presets, Source(file))
    assert said in str(raised.value)
    assert len(raised.value.faults) == 1

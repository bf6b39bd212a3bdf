"""Tables of names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtune.core import table as tables
from mmtune.core.errors import UserError
from mmtune.core.table import Table, allow, nearest, refuse_unasked


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a module of Fractions, one that is broken, and an installed package."""
    (tmp_path / "halves.py").write_text(
        "from fractions import Fraction\nclass Half(Fraction): ...\nten = 10\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "lacking.py").write_text("import nowhere_to_be_found\n")
    installed = tmp_path / "halves-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    points = "[numbers]\nhalf = halves:Half\nthird = halves:Half\n[other.numbers]\nfourth = halves:Half\n"
    (installed / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    tables._entry_points.cache_clear()
    yield tmp_path
    tables._entry_points.cache_clear()


def numbers() -> Table:
    own = {
        "third": "fractions:Fraction",
        "one": "fractions:Fraction",
        "halves_N": "tests.core.test_table:halved",
    }
    return Table("number", own, contract="fractions:Fraction", group="numbers")


def halved(number: int) -> str:
    return f"{number} halves"


def test_a_name_gives_what_it_stands_for() -> None:
    table = Table("number", {"join": "os.path:join", "pi": "math:pi"})
    assert table.load("pi") == 3.141592653589793
    assert table.names() == ["join", "pi"]


def test_an_unknown_name_helps() -> None:
    table = Table("tuner", {"lora": "a:b", "frozen": "c:d"})
    with pytest.raises(UserError) as caught:
        table.load("loar")
    assert caught.value.faults[0].what == "unknown tuner 'loar'"
    assert caught.value.faults[0].mend == "Did you mean 'lora'?"
    with pytest.raises(UserError, match=r"Known: frozen, lora\."):
        table.load("xyz")


@pytest.mark.parametrize("name", ["lor", "LORA", "lora2", ""])
def test_names_are_exact(name: str) -> None:
    with pytest.raises(UserError):
        Table("tuner", {"lora": "math:pi"}).load(name)


@pytest.mark.parametrize("name", ["halves_N", "halves_0", "halves_02", "halves_100", "halves_99999999999"])
def test_a_numbered_name_has_a_number(name: str) -> None:
    assert numbers().load("halves_99") == "99 halves"
    assert name not in numbers()
    with pytest.raises(UserError, match=rf"unknown number '{name}'\n *.*\bhalves_2\b") as caught:
        numbers().load(name)
    assert "N" not in caught.value.faults[0].mend


def test_the_known_names_are_told_once() -> None:
    table = Table("mlp", {"mlp2x": "math:pi", "mlpNx": "math:pow"})
    assert table.nearest("zzzzzzz") == "Known: mlp2x."


def test_a_taken_name_is_a_mistake_of_the_programs() -> None:
    with pytest.raises(ValueError, match="already in the table"):
        Table("tuner", {"lora": "a:b"}).add("lora", "c:d")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from mmtune.core.table import Table; t = Table('x', {'a': 'fractions:Fraction'});"
        "assert 'fractions' not in sys.modules; t.load('a'); assert 'fractions' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nearest_lists_all_where_none_is_near() -> None:
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."


@pytest.mark.parametrize(("name", "found"), [("halves_1", "1 halves"), ("halves_30", "30 halves")])
def test_a_name_may_hold_a_number(name: str, found: str) -> None:
    assert name in numbers() and numbers().load(name) == found


@pytest.mark.parametrize("name", ["halves_0", "halves_03", "halves_", "halves_-1", "halves_1x", "xhalves_1"])
def test_another_number_is_unknown(name: str) -> None:
    assert name not in numbers()
    with pytest.raises(UserError, match="unknown number"):
        numbers().load(name)


def test_parts_from_outside_by_module_and_by_entry_point(outside: Path) -> None:
    assert numbers().load("halves:Half").__name__ == "Half"
    assert numbers().load("half") is numbers().load("halves:Half")
    assert "half" in numbers() and "half" in numbers().names() and "fourth" not in numbers()
    with pytest.raises(UserError, match="unknown tuner 'halves:Half'"):  # a table without a contract
        Table("tuner", {}).load("halves:Half")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:Half", "there is no module nowhere\n.*PYTHONPATH"),
        ("halves.deeper:Half", "there is no module halves.deeper"),
        ("halves:Halve", "halves has no Halve\n *Did you mean 'Half'"),
        ("halves:ten", "halves:ten is no subclass of fractions.Fraction"),
        ("broken:Half", "broken cannot be imported: ZeroDivisionError"),
        ("lacking:Half", "lacking cannot be imported: ModuleNotFoundError: No module named 'nowhere_to"),
        ("a b:Half", "unknown number 'a b:Half'\n *Write MODULE:CLASS"),
        (
            "third",
            "'third' is mmtune's own and also what installed packages call halves:Half\n *Write halves:Half",
        ),
    ],
)
def test_what_a_part_from_outside_lacks(outside: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"(?s)model.kind: .*{said}"):
        numbers().load(name, "model.kind")


def test_two_packages_may_not_give_one_name(outside: Path) -> None:
    other = outside / "also-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: also\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[numbers]\nhalf = broken:Half\n")
    with pytest.raises(UserError, match=r"'half' is what installed packages call .* and "):
        numbers().load("half")


def test_code_is_only_run_where_somebody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_allowed", set())
    refuse_unasked("resampler", "DIR")  # a name of a table or of an installed package
    refuse_unasked(":", "DIR")  # names no code, and no table knows it
    with pytest.raises(
        UserError, match=r"(?s)DIR: it names code outside mmtune, a.b:C, .*MMTUNE_ALLOW=a.b:C"
    ):
        refuse_unasked("a.b:C", "DIR")
    monkeypatch.setenv("MMTUNE_ALLOW", "a.b:D,a.b:C")
    refuse_unasked("a.b:C", "DIR")
    monkeypatch.delenv("MMTUNE_ALLOW")
    allow("a.b:C")
    refuse_unasked("a.b:C", "DIR")
    with pytest.raises(UserError):
        refuse_unasked("a.b:D", "DIR")

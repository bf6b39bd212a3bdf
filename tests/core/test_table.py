"""Tables of names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmtune.core.errors import UserError
from mmtune.core.table import Table, nearest


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

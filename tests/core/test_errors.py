"""What a user reads when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtune.core.errors import Fault, UserError


def test_a_fault_says_where_what_and_how_to_mend_it() -> None:
    assert (
        str(Fault("too long", "a.yaml, line 3", "Shorten it.")) == "a.yaml, line 3: too long\n    Shorten it."
    )
    assert str(Fault("too long")) == "too long"


def test_an_error_of_one_fault() -> None:
    error = UserError("no such file", where=Path("a.json"))
    assert error.faults == [Fault("no such file", "a.json")]
    assert str(error) == "a.json: no such file"


def test_an_error_of_several_faults_keeps_them_all_and_their_order() -> None:
    faults = [Fault("first", "a"), Fault("second", "b", "Mend it.")]
    with pytest.raises(UserError) as caught:
        raise UserError.of(iter(faults))
    assert caught.value.faults == faults
    assert str(caught.value) == "a: first\nb: second\n    Mend it."

"""The table has every key of theirs, with their default, once; and what it names of ours exists."""

from __future__ import annotations

import pytest

from megatron_vppo.importing import easyr1_keys
from megatron_vppo.importing.easyr1_keys import KEYS
from tests.importing.their_keys import SET_BY_PROGRAM, SETTABLE
from tests.test_docs import is_setting


def test_the_table_has_their_keys_and_no_others() -> None:
    assert len(SETTABLE) == 183 and len(SET_BY_PROGRAM) == 17
    assert sorted(key.name for key in easyr1_keys.SETTABLE) == sorted(SETTABLE)
    assert sorted(key.name for key in easyr1_keys.PROGRAM) == sorted(SET_BY_PROGRAM)
    assert len(KEYS) == 200


def test_the_table_has_their_defaults() -> None:
    ours = {name: key.default for name, key in KEYS.items()}
    assert ours == SETTABLE | SET_BY_PROGRAM


def test_defaults_are_values_of_their_kinds() -> None:
    assert [name for name, key in KEYS.items() if key.kind.value_of(key.default) != key.default] == []


def test_the_table_names_settings_that_exist() -> None:
    named = {setting for key in KEYS.values() for setting in key.rule.settings}
    assert len(named) > 55
    assert [name for name in named if not is_setting(name)] == []


def test_every_flag_that_a_key_goes_with_is_one() -> None:
    flags = {key.only_with for key in KEYS.values()} - {""}
    assert len(flags) == 3
    assert {type(SETTABLE[flag]) for flag in flags} == {bool}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_key_says_what_becomes_of_it(name: str) -> None:
    rule = KEYS[name].rule
    assert rule.settings or rule.note

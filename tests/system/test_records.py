"""A value from JSON is exactly the record that it should be, or the first field that is not is named."""

from __future__ import annotations

import pytest
from pydantic import Field

from megatron_vppo.system.records import Record, parse_record


class _Place(Record):
    epoch: int = Field(ge=0)
    shuffle: bool
    names: list[str]


GOOD = {"epoch": 2, "shuffle": False, "names": ["a"], "of somebody else": None}


def test_a_record_is_read_with_its_types() -> None:
    place = parse_record(_Place, GOOD)
    assert (place.epoch, place.shuffle, place.names) == (2, False, ["a"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^holds list, not a JSON object$"),
        (None, r"^holds NoneType, not a JSON object$"),
        ({}, r"^lacks epoch$"),
        ({"epoch": 1, "names": []}, r"^lacks shuffle$"),
        ({**GOOD, "epoch": -1}, r"^has epoch=-1: Input should be greater than or equal to 0$"),
        ({**GOOD, "epoch": True}, r"^has epoch=True: Input should be a valid integer$"),
        ({**GOOD, "epoch": 2.0}, r"^has epoch=2\.0: Input should be a valid integer$"),
        ({**GOOD, "epoch": "2"}, r"^has epoch='2': Input should be a valid integer$"),
        ({**GOOD, "shuffle": 0}, r"^has shuffle=0: Input should be a valid boolean$"),
        ({**GOOD, "names": ["a", 1]}, r"^has names\.1=1: Input should be a valid string$"),
    ],
)
def test_a_value_that_is_no_such_record(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_record(_Place, value)

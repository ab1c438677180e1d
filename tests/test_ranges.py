import dataclasses
import math
from typing import Annotated, Literal

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.ranges import Checked, Range, Several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    count: Annotated[int, Range(1, 1000)] = 5
    rate: Annotated[float, Range(0, 1e4)] = 0.1
    limit: Annotated[float, Range(1e-12, math.inf)] = 1.0
    kept: Annotated[int, Range(1, 9)] | None = None
    rates: Annotated[tuple[Annotated[float, Range(0, 1)], ...], Several(2, different=True)] = (0, 1)
    pair: tuple[Annotated[int, Range(1, 9)], str] = (1, "")
    kind: Literal["a", "b"] = "a"
    name: str = ""
    below: bool = False


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 1000, "rate": 0, "limit": math.inf, "kept": 9},
        {"count": np.int64(3), "rate": np.float32(0.5)},
        {"rates": [0.5, 0.25, 1], "pair": (9, "x"), "kind": "b"},
    ],
)
def test_what_is_in_range_is_taken(fields):
    Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count is 0; it must be a whole number from 1 to 1000"),
        ({"count": 10**400}, "whole number from 1 to 1000"),
        ({"count": 2.0}, "count is 2.0; it must be a whole number"),
        ({"count": True}, "count is True"),
        ({"rate": math.nan}, "rate is nan; it must be a number from 0 to 10000"),
        ({"rate": math.inf}, "rate is inf"),
        ({"rate": "0.1"}, "rate is '0.1'"),
        ({"limit": 0.0}, "limit is 0.0; it must be a number 1e-12 or more"),
        ({"limit": math.nan}, "limit is nan"),
        ({"kept": 0}, "kept is 0; it must be a whole number from 1 to 9"),
        ({"rates": (0.5,)}, "rates is (0.5,); it must have at least 2"),
        ({"rates": (0.5, 0.5)}, "all of them must be different"),
        ({"rates": (0.5, 7.0)}, "rates has an entry that is 7.0; it must be a number from 0 to 1"),
        ({"rates": 0.5}, "rates is 0.5; it must be a tuple"),
        ({"pair": (0, "")}, "pair has an entry that is 0"),
        ({"pair": (1,)}, "pair is (1,); it must have 2 entries"),
        ({"kind": "c"}, "kind is 'c'; choose one of a, b"),
    ],
)
def test_what_is_not_is_one_line_with_field_value_and_range(fields, message):
    with pytest.raises(UserError) as error:
        Config(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)

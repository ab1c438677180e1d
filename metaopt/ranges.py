"""The ranges of the numbers of a config, declared in its types and checked when it is made.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Checked):
        num_steps: Annotated[int, Range(1, 1000)] = 5
        rates: Annotated[tuple[Rate, ...], Several()] = (0.1, 0.3)

The upper ends lie where a number has lost its meaning, or no machine could compute with it.
What relates several fields is checked by hand, in a ``__post_init__`` that calls this one first.
"""

import functools
import math
import numbers
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

from metaopt.errors import UserError


class Range(NamedTuple):
    """The least and the largest value of a number, both allowed; NaN never is."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in self)
        return f"{low} or more" if self.high == math.inf else f"from {low} to {high}"


class Several(NamedTuple):
    """A tuple has at least ``least`` entries, all different if ``different``."""

    least: int = 1
    different: bool = False


Seed = Annotated[int, Range(0, 2**31 - 1)]
Seeds = Annotated[tuple[Seed, ...], Several(different=True)]
Count = Annotated[int, Range(1, 10**6)]  # of what is held in memory: tasks, examples, episodes
Steps = Annotated[int, Range(1, 10**9)]  # of what is done one after another
CountOr0 = Annotated[int, Range(0, 10**6)]
StepsOr0 = Annotated[int, Range(0, 10**9)]
InnerSteps = Annotated[int, Range(1, 10**4)]
Width = Annotated[int, Range(1, 2**16)]
Layers = Annotated[int, Range(1, 256)]
Heads = Annotated[int, Range(1, 1024)]
Length = Annotated[int, Range(1, 2**20)]  # tokens
Vocabulary = Annotated[int, Range(2, 10**7)]
ImageSize = Annotated[int, Range(1, 4096)]  # pixels
Positive = Annotated[float, Range(1e-12, 1e12)]
Rate = Annotated[float, Range(1e-12, 1e4)]
RateOr0 = Annotated[float, Range(0, 1e4)]
NotNegative = Annotated[float, Range(0, 1e12)]
Share = Annotated[float, Range(0, 1)]
Seconds = Annotated[float, Range(0, 1e9)]


class OutOfRange(UserError):
    """A field of a config has a value that it may not have; ``field`` is its name."""

    def __init__(self, field: str, problem: str):
        self.field, self.problem = field, problem
        super().__init__(f"{field} {problem}")


class Checked:
    """The base of a config: when one is made, its fields are checked against their types.

    Numbers must be in the `Range` that their type is annotated with, where that goes on to
    infinity too; a `Literal` must be one of its values; tuples are checked entry by entry.

    Raises:
      OutOfRange: of the first field that is wrong.
    """

    def __post_init__(self):
        for name, hint in field_types(type(self)).items():
            check_value(name, getattr(self, name), hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises OutOfRange if a value is not of a type, such as one of those above."""
    if problem := what_is_wrong(value, hint):
        raise OutOfRange(name, problem)


@functools.cache
def field_types(config_type: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with what they are annotated with."""
    found = typing.get_type_hints(config_type, include_extras=True)
    return {name: found[name] for name in getattr(config_type, "__dataclass_fields__", ())}


def shared_fields(config_type: type, other: Any) -> dict[str, Any]:
    """The values that a config can take over from another one, whose fields have the same names."""
    return {n: getattr(other, n) for n in field_types(config_type) if hasattr(other, n)}


def what_is_wrong(value: Any, hint: Any, limits: tuple[Any, ...] = ()) -> str | None:
    """What follows the name of a field whose value is wrong: ``is 0; it must be ...``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return what_is_wrong(value, args[0], (*args[1:], *limits))
    if origin in (typing.Union, types.UnionType):
        problems = [what_is_wrong(value, arg, limits) for arg in args]
        return None if None in problems else problems[0]
    if origin is Literal:
        choices = ", ".join(map(str, args))
        return None if value in args else f"is {value!r}; choose one of {choices}"
    if hint is types.NoneType:
        return None if value is None else "is not None"
    if hint in (int, float):
        return _wrong_number(value, hint, limits)
    if origin is tuple:
        return _wrong_tuple(value, args, limits)
    return None


def _wrong_number(value: Any, hint: type, limits: tuple[Any, ...]) -> str | None:
    kind = numbers.Integral if hint is int else numbers.Real
    ranges = [limit for limit in limits if isinstance(limit, Range)] or [Range(-math.inf, math.inf)]
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if fits and all(limit.low <= value <= limit.high for limit in ranges):  # type: ignore
        return None
    noun = "a whole number" if hint is int else "a number"
    return f"is {value!r}; it must be {noun} {' and '.join(map(str, ranges))}"


def _wrong_tuple(values: Any, hints: tuple[Any, ...], limits: tuple[Any, ...]) -> str | None:
    if not isinstance(values, tuple | list):
        return f"is {values!r}; it must be a tuple"
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(values)
    if len(hints) != len(values):
        return f"is {values!r}; it must have {len(hints)} entries"
    for limit in limits:
        if isinstance(limit, Several):
            if len(values) < limit.least:
                return f"is {values!r}; it must have at least {limit.least} of them"
            if limit.different and len(set(values)) < len(values):
                return f"is {values!r}; all of them must be different"
    for value, hint in zip(values, hints, strict=True):
        if problem := what_is_wrong(value, hint):
            return f"has an entry that {problem}"
    return None

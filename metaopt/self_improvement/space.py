"""What may be changed about a training: its settings by name, and the values they may take."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Literal, TypeGuard

from metaopt.errors import UserError

Setting = float | int | str | bool
Settings = Mapping[str, Setting]
Score = Literal["loss", "efficiency", "throughput"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A positive number that is changed by factors.

    Attributes:
      low: the least it may be.
      high: the most.
      factor: of the first attempts; later ones take its square root, and so on.
      integer: whether it is rounded.
      multiple: an integer is a multiple of this one: of the devices, say.
      score: what a change is judged by: the held-out ``loss`` after equally many examples;
        ``efficiency``, its improvement a second; or ``throughput``, examples a second.
      coupled: settings that change with it, as the power of its factor: a batch four times
        as large with ``{'outer_learning_rate': 0.5}`` goes with twice the rate.
    """

    low: float
    high: float
    factor: float = 8.0
    integer: bool = False
    multiple: int = 1
    score: Score = "loss"
    coupled: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not 0 < self.low <= self.high < math.inf or not 1 < self.factor < math.inf:
            raise UserError(
                f"a scale needs 0 < low <= high and a factor above 1, not low={self.low}, "
                f"high={self.high}, factor={self.factor}"
            )
        if self.integer and (self.multiple < 1 or self._lowest > self._highest):
            raise UserError(
                f"no multiple of {self.multiple} is between low={self.low} and high={self.high}"
            )

    @property
    def coupled_names(self) -> set[str]:
        """Of the settings that change with it."""
        return set(self.coupled)

    @property
    def _lowest(self) -> int:
        return math.ceil(self.low / self.multiple) * self.multiple

    @property
    def _highest(self) -> int:
        return math.floor(self.high / self.multiple) * self.multiple

    def scaled(self, value: float, factor: float) -> float:
        """``value · factor`` within the bounds; an integer where it is one."""
        if not self.integer:
            return min(max(value * factor, self.low), self.high)
        nearest = round(value * factor / self.multiple) * self.multiple
        return min(max(nearest, self._lowest), self._highest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting that takes one of some values.

    Attributes:
      values: all of them.
      score: as for `Scale`.
      coupled: settings that change with it, for each value how large they should be beside those
        of a value that is not named: ``{'sgd': {'outer_learning_rate': 100.0}}``.
    """

    values: tuple[Setting, ...]
    score: Score = "loss"
    coupled: Mapping[Setting, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.values:
            raise UserError("a choice needs at least one value")
        if unknown := self.coupled.keys() - set(self.values):
            value = sorted(map(str, unknown))[0]
            raise UserError(f"a choice has settings for {value!r}, which is none of {self.values}")
        if not all(0 < x < math.inf for each in self.coupled.values() for x in each.values()):
            raise UserError(f"the factors of a choice must be above 0, not {self.coupled}")

    @property
    def coupled_names(self) -> set[str]:
        """Of the settings that change with some of its values."""
        return {name for each in self.coupled.values() for name in each}

    def factors(self, old: Setting, new: Setting) -> dict[str, float]:
        """What coupled settings are multiplied by where one value takes the place of another."""
        nothing: Mapping[str, float] = {}
        before, after = self.coupled.get(old, nothing), self.coupled.get(new, nothing)
        names = sorted({*before, *after})
        return {name: after.get(name, 1.0) / before.get(name, 1.0) for name in names}


Space = Mapping[str, Scale | Choice]


def check_settings(space: Space, settings: Settings) -> None:
    """Raises UserError where a setting that may be changed is missing or out of its bounds."""
    for name, axis in space.items():
        if name not in settings:
            raise UserError(f"setting {name!r} may be changed, but has no value to start from")
        value = settings[name]
        if isinstance(axis, Choice) and value not in axis.values:
            raise UserError(f"{name} is {value!r}: choose one of {axis.values}")
        if isinstance(axis, Scale) and not (_is_number(value) and axis.low <= value <= axis.high):
            raise UserError(
                f"{name} is {value!r}; it may be changed by factors, so it must be a number from "
                f"{axis.low:g} to {axis.high:g}"
            )
        if unknown := axis.coupled_names - settings.keys():
            raise UserError(f"{name} is coupled to {sorted(unknown)[0]!r}, which is no setting")


def known_settings(space: Space, settings: Settings) -> dict[str, Setting]:
    """Of settings from elsewhere those that may be changed, within their bounds."""
    known: dict[str, Setting] = {}
    for name, axis in space.items():
        value = settings.get(name)
        if isinstance(axis, Choice):
            known |= {name: value} if value in axis.values else {}
        elif _is_number(value) and 0 < value <= sys.float_info.max:  # an int may be larger
            known[name] = axis.scaled(value, 1.0)
    return known


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

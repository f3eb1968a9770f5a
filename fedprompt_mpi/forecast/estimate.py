"""Seconds with what is not known of them.

Each figure depends on constants that were measured (a rate, a latency, the seconds of a client), each with a relative
error. Two phases that depend on one constant are wrong together; errors of different constants are independent.
"""

import dataclasses
import math
from collections.abc import Mapping

from fedprompt_mpi.comm.statistics import NORMAL_95


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, and their standard deviation by constant."""

    seconds: float = 0.0
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Constant -> seconds of one standard deviation."""

    def __add__(self, other: "Estimate") -> "Estimate":
        names = {**self.spread, **other.spread}
        spread = {name: self.spread.get(name, 0.0) + other.spread.get(name, 0.0) for name in names}
        return Estimate(self.seconds + other.seconds, spread)

    def __mul__(self, factor: float) -> "Estimate":
        return Estimate(self.seconds * factor, {name: own * factor for name, own in self.spread.items()})

    def less_certain(self, name: str, relative: float) -> "Estimate":
        """Return it with one more error, as a share of the seconds."""
        return self + Estimate(0.0, {name: relative * self.seconds})

    @property
    def deviation(self) -> float:
        """Standard deviation of all errors together, in seconds."""
        return math.hypot(*self.spread.values())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, in seconds: errors multiply, so that it never reaches 0."""
        if self.seconds <= 0:
            return 0.0, NORMAL_95 * self.deviation
        reach = math.exp(NORMAL_95 * math.sqrt(math.log1p((self.deviation / self.seconds) ** 2)))
        return self.seconds / reach, self.seconds * reach


def total(parts: Mapping[str, Estimate]) -> Estimate:
    """Return the sum of phases that follow one another."""
    return sum(parts.values(), Estimate())

"""How unequal clients are, and what waiting for the slowest of them costs.

A round lasts as long as its slowest worker. With W workers whose times are independent and have the distribution F, the
slowest has F^W; its mean follows from a sorted sample x_1 <= ... <= x_M of one worker's times:

    E[max] = sum_i x_i ((i / M)^W - ((i - 1) / M)^W)

References:
    David and Nagaraja, Order Statistics, 2003, Section 2.1 (the distribution of the largest).
"""

import csv
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_text

SAMPLE, LEAST_SAMPLE = 100_000, 10_000
"""M: times of a worker that are drawn, if it has few clients and if it has many."""
MOST_DRAWN = 2_000_000
MANY = 1_000
"""Beyond, the sum of a worker's clients is taken for normally distributed."""
MOST_SIGMA, MOST_RATIO = 1.5, 20.0
"""Wider distributions have means that no sample shows."""
MOST_RATES_BYTES = 2**26
GIVE = (
    f"lognormal:SIGMA (0 to {MOST_SIGMA:g}), uniform:RATIO (1 to {MOST_RATIO:g}), a CSV file with a column rate, or run"
)


class Speeds:
    """The time of a client in units of the mean client's: a distribution, or the times of known clients."""

    def __init__(self, name: str, times: Sequence[float] | np.ndarray | None = None) -> None:
        """Take a distribution by its name, or the times of known clients.

        Raises:
            SettingsError: if there is no such distribution.
        """
        self.name, self.times, self._width = name, None, 0.0
        if times is not None:
            found = np.asarray(times, dtype=np.float64)
            with np.errstate(over="ignore"):
                mean = float(found.mean()) if len(found) else 0.0
            if not 0 < mean < math.inf:
                raise SettingsError(f"--speeds: the clients of {name} take {mean:g} in the mean: give others")
            self.times = found / mean
            return
        self._kind, _, width = name.partition(":")
        bounds = {"equal": (0.0, 0.0), "lognormal": (0.0, MOST_SIGMA), "uniform": (1.0, MOST_RATIO)}
        try:
            low, high = bounds[self._kind]
            self._width = float(width) if self._kind != "equal" else 0.0
            if not low <= self._width <= high:
                raise ValueError
        except (KeyError, ValueError):
            raise SettingsError(f"--speeds is {name!r}: give {GIVE}") from None

    @property
    def are_equal(self) -> bool:
        """True if every client takes the same time."""
        if self.times is not None:
            return bool(np.ptp(self.times) == 0)
        return self._kind == "equal" or (self._kind == "lognormal" and self._width == 0)

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Draw clients' times `shape` float64, of mean 1."""
        if self.are_equal:
            return np.ones(shape)
        if self.times is not None:
            return rng.choice(self.times, shape)
        if self._kind == "uniform":
            return rng.uniform(2 / (1 + self._width), 2 * self._width / (1 + self._width), shape)
        return np.exp(rng.normal(-(self._width**2) / 2, self._width, shape))

    def limit(self, left_out: float) -> float:
        """Return the time beyond which a client is not waited for: so large a share of them, at most, is slower."""
        if not left_out:
            return math.inf
        times = self.times if self.times is not None else self.draw((SAMPLE,), np.random.default_rng(0))
        return float(np.quantile(times, 1 - left_out, method="higher"))


EQUAL = Speeds("equal")


def read_speeds(named: str, clients: Sequence[float]) -> Speeds:
    """Return the speeds that `--speeds` names.

    Args:
        named: a distribution, a CSV file with a column `rate` (examples a second, in any unit), or `run`.
        clients: the times of a run's own clients, for `run`.

    Raises:
        SettingsError: if there is no such distribution, or the file has no rates.
    """
    if named == "run":
        return Speeds("run", clients)
    if not named.endswith(".csv"):
        return Speeds(named)
    try:
        text = read_text(Path(named), MOST_RATES_BYTES).removeprefix("\ufeff")
        rates = [float(row["rate"]) for row in csv.DictReader(io.StringIO(text))]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        reason = "it has no column rate" if isinstance(error, KeyError) else error
        raise SettingsError(f"--speeds: {named} cannot be read as rates ({reason})") from error
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise SettingsError(f"--speeds: {named} has a rate that is not above 0, or none: give examples a second")
    with np.errstate(over="ignore", divide="ignore"):
        return Speeds(named, 1 / np.array(rates))


@functools.lru_cache(maxsize=1024)
def kept_mean(speeds: Speeds, left_out: float) -> float:
    """Return the mean time of a client, where those that are not waited for take none."""
    if speeds.are_equal or not left_out:
        return 1.0
    times = speeds.draw((SAMPLE,), np.random.default_rng(0))
    return float(np.where(times <= speeds.limit(left_out), times, 0.0).mean())


@functools.lru_cache(maxsize=4096)
def slowest(speeds: Speeds, clients: int, workers: int, left_out: float = 0.0, unevenness: float = 0.0) -> float:
    """Return the mean time of the slowest worker, in times of the mean client's.

    Args:
        speeds: of the clients.
        clients: K, in blocks of nearly equal size over the workers.
        workers: W.
        left_out: share of the clients, the slowest, that are not waited for.
        unevenness: deviation of the logarithm of what workers themselves differ by.
    """
    block, more = divmod(clients, workers)
    if speeds.are_equal and not unevenness:
        return float(block + (more > 0))
    fuller, others = (_times_of_a_worker(speeds, size, left_out, unevenness) for size in (block + 1, block))
    if not more:
        fuller = np.zeros(1)
    # the fuller workers and the others are independent: the distribution of the slowest of all is the product
    values = np.sort(np.concatenate([fuller, others]))
    below = _share_below(fuller, values) ** more * _share_below(others, values) ** (workers - more)
    return float(values @ np.diff(below, prepend=0.0))


def _times_of_a_worker(speeds: Speeds, size: int, left_out: float, unevenness: float) -> np.ndarray:
    """Return a sorted sample `[M]` of the times of a worker with so many clients."""
    if not size:
        return np.zeros(1)
    rng, limit = np.random.default_rng(size), speeds.limit(left_out)
    rows = int(np.clip(MOST_DRAWN // size, LEAST_SAMPLE, SAMPLE))
    if speeds.are_equal:
        total = np.full(rows, float(size))
    elif size > MANY:
        times = speeds.draw((SAMPLE,), rng)
        times[times > limit] = 0.0
        total = rng.normal(size * times.mean(), math.sqrt(size) * times.std(), rows)
    else:
        total = np.zeros(rows)
        for _ in range(size):
            times = speeds.draw((rows,), rng)
            total += np.where(times <= limit, times, 0.0)
    return np.sort(total * np.exp(rng.normal(-(unevenness**2) / 2, unevenness, rows)))


def _share_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which share of a sorted sample is at most each value."""
    return np.searchsorted(ordered, values, side="right") / len(ordered)

"""A forecast against a run that was done: signed errors of its phases, and which lie in their intervals."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from fedprompt_mpi.forecast.estimate import Estimate
from fedprompt_mpi.forecast.model import Model, Scenario, fit
from fedprompt_mpi.forecast.network import Network
from fedprompt_mpi.forecast.sources import Measured, read_rounds_of
from fedprompt_mpi.rundir.formats import format_seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One figure, forecast and measured."""

    name: str
    forecast: Estimate
    measured: float
    """Seconds, above 0."""

    @property
    def error(self) -> float:
        """Signed, relative to what was measured."""
        return self.forecast.seconds / self.measured - 1

    @property
    def holds(self) -> bool:
        """True if the interval holds what was measured."""
        low, high = self.forecast.interval
        return low <= self.measured <= high

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        low, high = self.forecast.interval
        return {
            "name": self.name, "forecast_s": self.forecast.seconds, "low_s": low, "high_s": high,
            "measured_s": self.measured, "error": self.error, "holds": self.holds,
        }  # fmt: skip


def score_run(directory: Path, measured: Measured, measured_on: Network | None, network: Network | None) -> list[Score]:
    """Return the phases of a run's rounds, forecast from other sources and as measured; the round is the last.

    How long rank 0 aggregates is not among them: it does so while vectors arrive, and the round has what is left.

    Raises:
        SettingsError: if the run was not measured, or its method is in no source.
    """
    done = read_rounds_of(directory, least=1)
    source = measured.run_of(done.method, done.collective, done.wire)
    scenario = Scenario(place=done.place, collective=done.collective, wire=done.wire)
    forecast = Model(source, fit(measured, measured_on, network)).forecast(scenario)
    every = source.config.output.evaluate_every
    found = {name: statistics.median(seconds) for name, seconds in (("train", done.train), *done.transfers.items())}
    scores = [
        Score(name=name, forecast=forecast.phases[name], measured=seconds)
        for name, seconds in found.items() if seconds > 0 and name in forecast.phases
    ]  # fmt: skip
    if done.evaluation:
        scores.append(Score(name="evaluate", forecast=forecast.phases["evaluate"] * every, measured=done.evaluation))
    scores.append(Score(name="round", forecast=forecast.round, measured=done.round))
    return scores


def format_scores(scores: list[Score], directory: Path) -> str:
    """Return the scores as a table."""
    lines = [f"{directory}", f"{'phase':<12}{'forecast':>12}{'95 % from':>12}{'to':>12}{'measured':>12}{'error':>9}"]
    for one in scores:
        low, high = one.forecast.interval
        cells = "".join(f"{format_seconds(s):>12}" for s in (one.forecast.seconds, low, high, one.measured))
        lines.append(f"{one.name:<12}{cells}{one.error:>+9.1%}{'' if one.holds else '   outside'}")
    return "\n".join(lines)

"""What a run prints: who takes part, a line per round, and the closing table. Rank 0 alone has one."""

from collections.abc import Callable
from typing import Any

from fedprompt_mpi.audit.lines import audit_lines
from fedprompt_mpi.audit.record import AuditRecord
from fedprompt_mpi.comm.progress import Screen
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.rundir.closing_table import closing_table, filter_words
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.formats import format_left, format_rate, join_parts
from fedprompt_mpi.rundir.records import PartitionRecord, RoundRecord, Summary


class Console:
    """Prints the course of one run on a screen."""

    def __init__(self, screen: Screen, config: RunConfig) -> None:
        """Print on `screen`."""
        self._screen, self._config = screen, config
        self._left = TimeLeft(config)
        self._going_on = ""

    def say(self, text: str) -> None:
        """Print lines."""
        self._screen.say(text)

    def say_round(self, record: RoundRecord) -> None:
        """Print the line of a round."""
        rounds = self._config.federation.rounds
        parts = [f"round {record.round:>{len(str(rounds))}}/{rounds}"]
        if record.is_evaluated:
            parts.append(f"accuracy {format_rate(record.accuracy):>8}")
            if record.attack_success_rate is not None:
                clean = record.clean_attack_success_rate
                beside = "" if clean is None else f" (clean {format_rate(clean)})"
                parts.append(f"ASR {format_rate(record.attack_success_rate):>8}{beside}")
        if record.train_loss is not None:
            parts.append(f"loss {record.train_loss:.3f}")
        parts.append(f"{record.seconds.total:.2f} s")
        if record.dropped:
            parts.append(f"not finite, left out: {', '.join(map(str, record.dropped))}")
        if record.aggregated is False:
            parts.append(f"{record.given_up or 'too few to aggregate'}; prompt kept")
        self._left.note(record)
        self.say(join_parts(parts))
        self._screen.stage("", quiet=True)

    def start_filter(self, round_: int) -> None:
        """Say that clients look at their examples."""
        self._screen.stage(f"before round {round_}, filtering examples", quiet=True)

    def say_filter(self, record: FilterRecord) -> None:
        """Print what the example filter did."""
        self.say(join_parts([f"before round {record.round}", *filter_words(record)]))

    def say_audit(self, record: AuditRecord) -> None:
        """Print what the attacks of an audit found."""
        self.say("\n" + "\n".join(audit_lines(record)))

    def say_summary(self, summary: Summary, partition: PartitionRecord, figures: dict[str, Any]) -> None:
        """Print the closing table."""
        self.say("\n" + closing_table(summary, partition, figures, self._config))

    def start_steps(self, round_: int, total: int) -> Callable[[int], None]:
        """Say that a round trains; return a function that says how many steps the slowest rank has done."""
        rounds = self._config.federation.rounds
        self._going_on = what = f"round {round_:>{len(str(rounds))}}/{rounds}"
        self._screen.stage(what, rounds, quiet=True)

        def move(step: int) -> None:
            if self._going_on != what:  # a report that was late
                return
            share = step / max(total, 1)
            left = self._left.estimate(round_, share)
            note = f"step {step}/{total}" + ("" if left is None else f"  {format_left(left)} left")
            self._screen.advance(round_ - 1 + share, note)

        move(0)
        return move

    def start_evaluation(self, round_: int, total: int) -> Callable[[int], None]:
        """Say that the vector after a round is evaluated; return a function that says on how many texts."""
        rounds = self._config.federation.rounds
        what = "evaluating" if round_ == 0 else f"round {round_:>{len(str(rounds))}}/{rounds}, evaluating"
        self._going_on = what
        self._screen.stage(what, total, quiet=round_ > 0)
        return lambda done: self._screen.advance(done, f"{done:,} of {total:,} texts")


class TimeLeft:
    """How long the rounds that are left will take, from those that this job has done."""

    def __init__(self, config: RunConfig) -> None:
        """Know which rounds are evaluated."""
        self._rounds, self._every = config.federation.rounds, config.output.evaluate_every
        self._trained: list[float] = []
        self._evaluated: list[float] = []
        self._last: int | None = None

    def note(self, record: RoundRecord) -> None:
        """Take the seconds of a round; the first record is of a job before, or of before training."""
        if self._last is not None:
            self._trained.append(record.seconds.total - record.seconds.evaluate)
        if record.is_evaluated and record.seconds.evaluate:
            self._evaluated.append(record.seconds.evaluate)
        self._last = record.round

    def estimate(self, round_: int, share: float) -> float | None:
        """Return the seconds left when a share of the training of a round is done; None before the first is."""
        if not self._trained:
            return None
        evaluations = sum(1 for r in range(round_, self._rounds + 1) if r % self._every == 0 or r == self._rounds)
        trained, evaluated = _mean(self._trained), _mean(self._evaluated)
        return max(0.0, (self._rounds - round_ + 1 - share) * trained + evaluations * evaluated)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0

"""The output of a run on the terminal: progress bars, a line per round, and a closing table. Rank 0 alone has one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.rundir.records import RoundRecord, Summary
from fedprompt_mpi.start.launcher import launcher_pid

MOST_NAMED = 6
"""Up to so many clients are listed one by one in the closing table; partition.json has them all."""
LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")


class Console:
    """Prints lines, above the bars if there are any."""

    def __init__(self, rounds: int) -> None:
        """Prepare bars for a number of rounds if the output is a terminal."""
        self._rounds: Any = None
        self._steps: Any = None
        if on_terminal():
            stream = getattr(sys.stderr, "steering", sys.stderr)
            self._rounds = tqdm(total=rounds, unit="round", position=0, dynamic_ncols=True, file=stream)
            self._steps = tqdm(total=0, unit="step", position=1, leave=False, desc="slowest rank", file=stream)

    @property
    def has_bars(self) -> bool:
        """True if progress bars are shown."""
        return self._steps is not None

    def say(self, text: str) -> None:
        """Print lines above the bars."""
        if self._rounds is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def say_round(self, record: RoundRecord, rounds: int) -> None:
        """Print the line of a round and move the bar of rounds."""
        line = f"round {record.round:>3}/{rounds}"
        if record.is_evaluated:
            line += f"   accuracy {format_rate(record.accuracy):>8}"
            if record.attack_success_rate is not None:
                line += f"   ASR {format_rate(record.attack_success_rate):>8}"
            if record.clean_attack_success_rate is not None:
                line += f" (clean {format_rate(record.clean_attack_success_rate)})"
        if record.train_loss is not None:
            line += f"   train loss {record.train_loss:.3f}"
        if record.dropped:
            line += f"   not finite, left out: {', '.join(map(str, record.dropped))}"
        if record.aggregated is False:
            line += "   too few to aggregate, prompt kept"
        self.say(f"{line}   {record.seconds.total:.2f} s")
        if self._rounds is not None and record.round:
            self._rounds.update(record.round - self._rounds.n)

    def say_summary(self, summary: Summary, figures: dict[str, Any], config: RunConfig) -> None:
        """Print the closing table."""
        to_first = f"{summary.seconds_to_first_broadcast or 0:.1f} to the first broadcast"
        phases = "   ".join(f"{phase} {s:.1f}" for phase, s in summary.seconds_by_phase.items())
        rows = [
            ("accuracy", f"{format_rate(summary.accuracy)}   (before: {format_rate(summary.accuracy_before)})"),
            ("macro F1", f"{summary.macro_f1 or 0:.4f}"),
            *attack_rows(summary, config),
            *privacy_rows(summary, config),
            ("parameters", f"{summary.parameters:,} of {summary.plm_parameters:,}, {summary.ratio:.4%}"),
            ("per client and round", f"{format_count(summary.bytes_per_client_round)} each way"),
            ("seconds", f"{summary.seconds_total:.1f} in all, {to_first}"),
            ("seconds in the rounds", phases),
            ("", "(each of the slowest rank: rank 0 waits while workers train)"),
            ("a round, median", format_figures(figures)),
        ]
        self.say("\n" + format_rows(rows))

    def start_steps(self, total: int) -> Callable[[int], None] | None:
        """Begin a round's bar of local steps; return a function that moves it, or None without a terminal."""
        if self._steps is None:
            return None
        self._steps.reset(total=total)
        return self._move

    def _move(self, step: int) -> None:
        if step > self._steps.n:
            self._steps.update(step - self._steps.n)

    def close(self) -> None:
        """Remove the bars."""
        for bar in (self._steps, self._rounds):
            if bar is not None:
                bar.close()


def attack_rows(summary: Summary, config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows of the closing table about the attack and about excluded updates."""
    poison, clean = config.poison, summary.clean_attack_success_rate
    rate = format_rate(summary.attack_success_rate)
    if clean is not None:
        rate += f"   (clean run: {format_rate(clean)})"
    elif summary.malicious_clients and poison.has_trigger:
        remedy = "not evaluated after this round" if poison.clean_run else "not known, name one with --poison.clean_run"
        rate += f"   (clean run: {remedy})"
    rows = [("attack success rate", rate), ("poisoned clients", format_poisoned(summary.poisoned_examples))]
    local = [
        f"{who} {format_rate(own)}"
        for who, own in (
            ("malicious", summary.malicious_clients_attack_success_rate),
            ("honest", summary.honest_clients_attack_success_rate),
        )
        if own is not None
    ]
    if local:
        rows.append(("ASR of own prompts", f"{', '.join(local)} (means of clients, last round)"))
    if summary.malicious_clients and poison.attacks_update:
        ids = ", ".join(map(str, summary.malicious_clients))
        rows.append(("attack on the update", f"{poison.attack}, boost {poison.boost:g}, by {ids}"))
    if summary.dropped_updates:
        dropped = summary.dropped_updates
        by_client = ", ".join(f"client {client}: {count}" for client, count in dropped.items())
        rows.append(("not finite, left out", f"{sum(dropped.values())} updates ({by_client})"))
    return rows


def format_poisoned(examples: dict[str, int]) -> str:
    """Return the poisoned clients and how many examples of each; for many clients the range and the sum."""
    if len(examples) > MOST_NAMED:
        counts = sorted(examples.values())
        return f"{len(counts)}, with {counts[0]} to {counts[-1]} examples each, {sum(counts)} in all"
    return ", ".join(f"{client} ({count} examples)" for client, count in examples.items()) or "none"


def privacy_rows(summary: Summary, config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows of the closing table about privacy."""
    privacy, epsilon = config.privacy, summary.epsilon
    if privacy.mechanism == "none":
        return []
    if privacy.mechanism == "dp_fedavg":
        spent = f"epsilon {epsilon or 0:.2f} at delta {privacy.delta:g}, for one client more or less"
    elif epsilon is not None:
        spent = f"epsilon {epsilon:,.1f} for a client in all rounds"
    else:
        spent = (
            "epsilon cannot be derived: only client.optimizer sgd with steps, clip_norm and no weight decay bounds it"
        )
    return [("privacy", f"{privacy.mechanism}: {spent}")]


def on_terminal() -> bool:
    """Return True if stderr is a terminal: that of this process, or that of the launcher that started it.

    A launcher gives its ranks pipes, so that their own stderr does not tell.
    """
    if sys.stderr.isatty():
        return True
    process = launcher_pid()
    for _ in range(8):
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
            command = stat[stat.index("(") + 1 : stat.rindex(")")]
            if command in LAUNCHERS:
                return str(Path(f"/proc/{process}/fd/2").readlink()).startswith(("/dev/pts/", "/dev/tty"))
            process = int(stat[stat.rindex(")") + 2 :].split()[1])
        except (OSError, ValueError):
            return False
    return False


def format_count(number: float) -> str:
    """Return a number of bytes as text: 61,440 B, 14.3 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def format_rate(rate: float | None) -> str:
    """Return a rate in [0, 1] as a percentage."""
    return "-" if rate is None else f"{100 * rate:.2f} %"


def format_rows(rows: list[tuple[str, str]]) -> str:
    """Lay out names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def format_figures(figures: dict[str, Any]) -> str:
    """Return the phases of a median round, of its slowest rank; in observe mode wait and transfer are one."""
    names = ("wait", "transfer") if figures["mode"] == "measure" else ("wait + transfer",)
    parts = [
        f"{name} {format_seconds(figures['seconds'][name]['median'])}"
        for name in ("train", *names, "aggregate", "overhead")
        if name in figures["seconds"]
    ]
    note = "" if figures["mode"] == "measure" else "   (told apart by --comm.mode measure)"
    return "   ".join(parts) + note if parts else "none after the warm-up"


def format_seconds(seconds: float) -> str:
    """Return a duration with a unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e9:.0f} ns"

"""What a person sees: bars while it runs on a terminal, a line a round, and a closing table.

Only rank 0 has one of these that speaks; the other ranks' is silent.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fedprompt_mpi.config import RunConfig

MOST_NAMED = 6
"""So many clients are named in the closing table one by one; partition.json has them all."""
LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")


class Console:
    """Rank 0's voice."""

    def __init__(self, *, speaks: bool, rounds: int) -> None:
        """Prepare the bars, if a person is watching a terminal."""
        self.speaks = speaks
        self._rounds: Any = None
        self._steps: Any = None
        if speaks and on_terminal():
            self._rounds = tqdm(total=rounds, unit="round", position=0, dynamic_ncols=True)
            self._steps = tqdm(total=0, unit="step", position=1, leave=False, desc="slowest rank")

    def say(self, text: str) -> None:
        """Print lines above the bars."""
        if self._rounds is not None:
            tqdm.write(text, file=sys.stdout)
        elif self.speaks:
            print(text, flush=True)

    def say_round(self, record: dict[str, Any], rounds: int) -> None:
        """Print one round's line and move the bar of rounds."""
        line = f"round {record['round']:>3}/{rounds}"
        if "accuracy" in record:
            line += f"   accuracy {format_rate(record['accuracy']):>8}"
            if record["attack_success_rate"] is not None:
                line += f"   ASR {format_rate(record['attack_success_rate']):>8}"
            if record["clean_attack_success_rate"] is not None:
                line += f" (clean {format_rate(record['clean_attack_success_rate'])})"
        if record["train_loss"] is not None:
            line += f"   train loss {record['train_loss']:.3f}"
        if record["dropped"]:
            line += f"   not finite, left out: {', '.join(map(str, record['dropped']))}"
        if record["aggregated"] is False:
            line += "   too few to aggregate, prompt kept"
        self.say(f"{line}   {record['seconds']['total']:.2f} s")
        if self._rounds is not None and record["round"]:
            self._rounds.update(record["round"] - self._rounds.n)

    def say_summary(self, summary: dict[str, Any], figures: dict[str, Any], config: RunConfig) -> None:
        """Print the closing table."""
        to_first = f"{summary['seconds_to_first_broadcast']:.1f} to the first broadcast"
        phases = "   ".join(f"{phase} {s:.1f}" for phase, s in summary["seconds_by_phase"].items())
        rows = [
            ("accuracy", f"{format_rate(summary['accuracy'])}   (before: {format_rate(summary['accuracy_before'])})"),
            ("macro F1", f"{summary['macro_f1']:.4f}"),
            *attack_rows(summary, config),
            *privacy_rows(summary, config),
            ("parameters", f"{summary['parameters']:,} of {summary['plm_parameters']:,}, {summary['ratio']:.4%}"),
            ("per client and round", f"{format_count(summary['bytes_per_client_round'])} each way"),
            ("seconds", f"{summary['seconds_total']:.1f} in all, {to_first}"),
            ("seconds in the rounds", phases),
            ("a round, median", format_figures(figures)),
        ]
        self.say("\n" + format_rows(rows))

    def start_steps(self, total: int) -> Callable[[int], None] | None:
        """Begin a round's bar of local steps; returns what moves it, or None if nobody watches."""
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


def attack_rows(summary: dict[str, Any], config: RunConfig) -> list[tuple[str, str]]:
    """Return what the closing table says of the attack, and of who was left out."""
    poison, clean = config.poison, summary["clean_attack_success_rate"]
    rate = format_rate(summary["attack_success_rate"])
    if clean is not None:
        rate += f"   (clean run: {format_rate(clean)})"
    elif summary["malicious_clients"] and poison.has_trigger:
        remedy = "not evaluated after this round" if poison.clean_run else "not known, name one with --poison.clean_run"
        rate += f"   (clean run: {remedy})"
    rows = [("attack success rate", rate), ("poisoned clients", format_poisoned(summary["poisoned_examples"]))]
    local = [
        f"{who} {format_rate(summary[f'{who}_clients_attack_success_rate'])}"
        for who in ("malicious", "honest")
        if summary[f"{who}_clients_attack_success_rate"] is not None
    ]
    if local:
        rows.append(("ASR of own prompts", f"{', '.join(local)} (means of clients, last round)"))
    if summary["malicious_clients"] and poison.attacks_update:
        ids = ", ".join(map(str, summary["malicious_clients"]))
        rows.append(("attack on the update", f"{poison.attack}, boost {poison.boost:g}, by {ids}"))
    if summary["dropped_updates"]:
        dropped = summary["dropped_updates"]
        by_client = ", ".join(f"client {client}: {count}" for client, count in dropped.items())
        rows.append(("not finite, left out", f"{sum(dropped.values())} updates ({by_client})"))
    return rows


def format_poisoned(examples: dict[str, int]) -> str:
    """Return who was poisoned and how many examples of each; of many clients the sum."""
    if len(examples) > MOST_NAMED:
        counts = sorted(examples.values())
        return f"{len(counts)}, with {counts[0]} to {counts[-1]} examples each, {sum(counts)} in all"
    return ", ".join(f"{client} ({count} examples)" for client, count in examples.items()) or "none"


def privacy_rows(summary: dict[str, Any], config: RunConfig) -> list[tuple[str, str]]:
    """Return what the closing table says of privacy."""
    privacy, epsilon = config.privacy, summary["epsilon"]
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
    """Return whether a person sees this: our own stderr, or that of the mpirun above us, is a terminal.

    A launcher hands its ranks pipes, so that they cannot ask their own stderr.
    """
    if sys.stderr.isatty():
        return True
    process = os.getppid()
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
    """Return a number of bytes for people: 61,440 B, 14.3 MB."""
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
    """Return what a median round takes with its slowest rank; unmeasured, waiting and transfer stay together."""
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

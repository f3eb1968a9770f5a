"""The run directory: what a run leaves behind, file by file. Only rank 0 has one.

config.toml          the resolved settings: --config of it repeats the run
environment.json     versions, MPI library, rank -> host, device, threads
partition.json       client -> examples, by class, and which are poisoned
rounds.jsonl         a line per round; 0 is before training
timings.csv          round,rank,phase,seconds,bytes
communication.json   what a round's phases take: medians, quantiles, confidence intervals
prompt.safetensors   the global vector, the parameters by name, the effective prompt
summary.json         the closing figures
checkpoint/          what a resume needs
"""

import collections
import csv
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedprompt_mpi.comm.statistics import Row, communication, slowest_by_round
from fedprompt_mpi.comm.timing import PHASES, is_done
from fedprompt_mpi.config import CommConfig, RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import (
    MOST_LINES_BYTES,
    PROMPT_FILE,
    append_text,
    read_text,
    write_json,
    write_tensors,
    write_text,
)
from fedprompt_mpi.lock import is_empty

ROUNDS, TIMINGS, CHECKPOINTS = "rounds.jsonl", "timings.csv", "checkpoint"
AT_THE_END = ("summary.json", "communication.json")
"""Files that say that a run is at its end."""
PACKAGES = ("fedprompt_mpi", "torch", "transformers", "tokenizers", "safetensors", "datasets", "mpi4py", "numpy")


def to_toml(config: RunConfig) -> str:
    """Return the settings as TOML; unset ones are left out."""
    return tomli_w.dumps(to_dict(config))


def check_directory(directory: Path, *, resume: bool) -> None:
    """Make sure that a run may write here, without leaving anything behind.

    Raises:
        SettingsError: if another run is there already, or the place cannot be written to.
    """
    if not resume and directory.is_dir() and not is_empty(directory):
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which is not empty: name another, or resume the run in it"
        )
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        probe = existing / f".fedprompt-{id(directory)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"output.dir is {str(directory)!r}, which cannot be written to ({error.strerror})"
        ) from error


def read_rounds(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run directory's rounds, but for a last one that was not written to its end."""
    *whole, _ = read_text(directory / ROUNDS, MOST_LINES_BYTES).split("\n")
    return [json.loads(line) for line in whole]


def read_timings(directory: Path) -> Iterator[Row]:
    """Yield the records of a run directory, but for a last one that was not written to its end."""
    with (directory / TIMINGS).open(newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            yield int(row["round"]), int(row["rank"]), row["phase"], float(row["seconds"]), int(row["bytes"])


def check_records(directory: Path, done: int) -> None:
    """Make sure that a run which goes on after round `done` has the lines of the rounds before.

    Raises:
        SettingsError: if they cannot be read, or one is missing.
    """
    file = ROUNDS
    try:
        if [line["round"] for line in read_rounds(directory)][:done] != list(range(done)):
            raise ValueError(f"it has not all of the rounds 0 to {done - 1}")
        file = TIMINGS
        collections.deque(read_timings(directory), maxlen=0)
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise SettingsError(
            f"output.resume: {directory / file} cannot be read ({error}): put it back, or start anew in another "
            f"output.dir, with the last file in {directory / 'checkpoint'} as prompt.init"
        ) from error


def _as_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _as_csv(rows: Iterable[Row]) -> str:
    return "".join(f"{round_},{rank},{phase},{seconds:.9f},{size}\n" for round_, rank, phase, seconds, size in rows)


class Records:
    """Writes the files of one run."""

    def __init__(self, directory: Path, config: RunConfig, *, last_round: int) -> None:
        """Write down the settings.

        Args:
            directory: the run directory, which exists.
            config: the resolved settings.
            last_round: of a resumed run, the last round whose line counts (later ones come anew); -1 if it begins.
        """
        self.directory = directory
        for old in (*(directory / name for name in AT_THE_END), *directory.glob(f"{CHECKPOINTS}/.*")):
            old.unlink(
                missing_ok=True
            )  # what a run that goes on has not come to yet, and what a kill left half written
        self._begin_files(last_round)
        begun = dataclasses.replace(config, output=dataclasses.replace(config.output, resume=False))
        write_text(directory / "config.toml", to_toml(begun))

    def _begin_files(self, last: int) -> None:
        """Leave of the files that grow what was written up to a round; -1 for nothing."""
        rounds, timings = [], []
        if last >= 0:
            rounds = [record for record in read_rounds(self.directory) if record["round"] <= last]
            timings = [row for row in read_timings(self.directory) if is_done(row[0], row[2], last + 1)]
        write_text(self.directory / ROUNDS, _as_lines(rounds))
        write_text(self.directory / TIMINGS, "round,rank,phase,seconds,bytes\n" + _as_csv(timings))

    def write_environment(self, mpi: dict[str, Any], ranks: list[dict[str, Any]], *, compute_dtype: str) -> None:
        """Write versions, the MPI library, the arithmetic, and where each rank runs."""
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue  # an optional one, such as mpi4py without MPI
        write_json(
            self.directory / "environment.json",
            {"versions": versions, "mpi": mpi, "compute_dtype": compute_dtype, "ranks": ranks},
        )

    def write_partition(
        self, class_counts: np.ndarray, poisoned: np.ndarray, label_words: list[str], malicious: Collection[int]
    ) -> None:
        """Write how many examples of each class each client holds, and who is malicious."""
        clients = [
            {
                "client": k,
                "num_examples": int(row.sum()),
                "by_class": row.tolist(),
                "poisoned": int(extra),
                "malicious": k in malicious,
            }
            for k, (row, extra) in enumerate(zip(class_counts, poisoned, strict=True))
        ]
        write_json(self.directory / "partition.json", {"label_words": label_words, "clients": clients})

    def add_round(self, record: dict[str, Any]) -> None:
        """Add one round's line."""
        append_text(self.directory / ROUNDS, _as_lines([record]))

    def add_timings(self, by_rank: dict[int, np.ndarray]) -> None:
        """Add the records of each rank, as numbered at the start."""
        rows = (
            (round_, rank, PHASES[phase], seconds, payload)
            for rank, records in by_rank.items()
            for round_, phase, seconds, payload in records.tolist()
        )
        append_text(self.directory / TIMINGS, _as_csv(rows))

    def write_communication(self, comm: CommConfig) -> dict[str, Any]:
        """Write what a round's phases take, and set each round's seconds right: with its slowest rank."""
        timings, rounds = list(read_timings(self.directory)), read_rounds(self.directory)
        slowest = slowest_by_round(timings)
        for line in rounds:
            if line["round"] not in slowest:
                continue
            for name in ("train", "wait", "transfer", "aggregate", "evaluate"):
                line["seconds"][name] = slowest[line["round"]][name]
        write_text(self.directory / ROUNDS, _as_lines(rounds))
        figures = {"mode": comm.mode, **communication([timings], warmup=comm.warmup)}
        write_json(self.directory / "communication.json", figures)
        return figures

    def write_prompt(self, config: RunConfig, vector: np.ndarray, named: dict[str, np.ndarray], round_: int) -> None:
        """Write the global vector `[P]`, its parameters by name and the effective prompt."""
        metadata = {
            "method": config.prompt.method,
            "model": config.model.name,
            "task": config.task.name,
            "round": str(round_),
        }
        write_tensors(self.directory / PROMPT_FILE, {"vector": vector, **named}, metadata)

    def write_summary(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write the closing figures, those of the first and last round among them, and return them all."""
        rounds = read_rounds(self.directory)
        first, last = rounds[0], rounds[-1]
        trained = [record["seconds"] for record in rounds if record["round"] > 0]
        summary = {
            "accuracy": last["accuracy"],
            "attack_success_rate": last["attack_success_rate"],
            "clean_attack_success_rate": last["clean_attack_success_rate"],
            "macro_f1": last["macro_f1"],
            "accuracy_before": first["accuracy"],
            "rounds": last["round"],
            "dropped_updates": dict(collections.Counter(str(k) for record in rounds for k in record["dropped"])),
            "epsilon": last["epsilon"],
            "lost_ranks": [loss for record in rounds for loss in record.get("lost_ranks", [])],
            **figures,
            "seconds_by_phase": {
                phase: sum(seconds[phase] for seconds in trained)
                for phase in ("train", "wait", "transfer", "aggregate", "evaluate")
            },
        }
        write_json(self.directory / "summary.json", summary)
        return summary

"""The run directory: the name of every file in it, and what in it is not this program's."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fedprompt_mpi.files import RunFile, stats_in

ROUNDS, TIMINGS, PROMPT, REPORT, LOG = "rounds.jsonl", "timings.csv", "prompt.safetensors", "report.html", ".log"
CHECKPOINTS, FIGURES, SCALARS, LOCK = "checkpoint", "figures", "tensorboard", ".lock"
_CHECKPOINT = r"round-\d{8}\.safetensors"
_OWN = {
    "": "|".join(
        (r"(config\.toml|environment\.json|partition\.json|filtered\.json|audit\.json|rounds\.jsonl|timings\.csv|communication\.json)",
         r"(prompt\.safetensors|summary\.json|report\.html|tracking\.json|\.lock)")
    ),
    CHECKPOINTS: _CHECKPOINT,
    FIGURES: r"[\w-]+\.(png|svg)",
    SCALARS: r"events\.out\.tfevents\..+",
}  # fmt: skip
"""What this program writes: folder below the run directory -> names of its files."""
_UNFINISHED = r"\.[0-9a-z_]{8}"
"""Ends the name of a file that a killed run left half written; NFS keeps a removed file that is open as .nfs*."""


class RunPaths:
    """The files of one run.

    config.toml          the resolved settings: --config of it repeats the run
    environment.json     versions, MPI library, rank -> host, device, threads; and of each job before a resume
    partition.json       client -> examples, by class, and which are poisoned
    filtered.json        the examples that the example filter has left out
    audit.json           what the attacks of an audit have found
    rounds.jsonl         a line per round; 0 is before training
    timings.csv          round,rank,phase,seconds,bytes
    communication.json   the phases of a round: medians, quantiles, confidence intervals; of a finished run
    prompt.safetensors   the global vector, the parameters by name, the effective prompt
    summary.json         the closing figures; of a finished run
    report.html, figures/  the page of the run
    tensorboard/         events, if output.track or output.tensorboard asks for them
    tracking.json        how MLflow and W&B call the run
    checkpoint/          the last two checkpoints
    .lock                locked by the job that writes here
    """

    def __init__(self, directory: Path) -> None:
        """Name the files of the run in a directory, which need not exist."""
        self.directory = directory
        self.config = RunFile(directory, "config.toml")
        self.environment = RunFile(directory, "environment.json")
        self.partition = RunFile(directory, "partition.json")
        self.filtered = RunFile(directory, "filtered.json")
        self.audit = RunFile(directory, "audit.json")
        self.rounds = RunFile(directory, ROUNDS)
        self.timings = RunFile(directory, TIMINGS)
        self.communication = RunFile(directory, "communication.json")
        self.prompt = RunFile(directory, PROMPT)
        self.summary = RunFile(directory, "summary.json")
        self.report = RunFile(directory, REPORT)
        self.tensorboard = directory / SCALARS
        self.tracking = RunFile(directory, "tracking.json")
        self.lock = RunFile(directory, LOCK)

    def checkpoint(self, round_: int) -> RunFile:
        """Return the file of the checkpoint after a round."""
        return RunFile(self.directory, f"{CHECKPOINTS}/round-{round_:08d}.safetensors")

    def checkpoints(self) -> list[RunFile]:
        """Return the existing checkpoints, the latest first."""
        return self._checkpoints(_CHECKPOINT)

    def unfinished_checkpoints(self) -> list[RunFile]:
        """Return checkpoints that a killed run left half written."""
        return self._checkpoints(rf"\.{_CHECKPOINT}{_UNFINISHED}")

    def figure(self, name: str) -> RunFile:
        """Return a file in the folder of figures."""
        return RunFile(self.directory, f"{FIGURES}/{name}")

    def is_empty(self) -> bool:
        """Return True if the directory, which exists, has nothing but perhaps a lock."""
        return set(stats_in(self.directory)) <= {LOCK}

    def links(self) -> list[Path]:
        """Return what is neither a folder nor a file of one name: links, hard ones too, pipes, devices."""
        return [path for path, is_plain, _ in self._content() if not is_plain]

    def foreign(self) -> list[Path]:
        """Return the files and folders that this program does not write."""
        return [path for path, _, is_own in self._content() if not is_own]

    def _content(self) -> Iterator[tuple[Path, bool, bool]]:
        """Yield what is here, one level deep: path, is it a regular file or folder, is it this program's."""
        for below, pattern in _OWN.items():
            own = rf"({pattern})|\.({pattern}){_UNFINISHED}|\.nfs[0-9a-f]+"
            for name, seen in stats_in(self.directory, below).items():
                is_own = re.fullmatch(own, name) is not None
                is_folder, is_plain = stat.S_ISDIR(seen.st_mode), stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1
                if is_folder:
                    is_own = not below and name in _OWN
                yield self.directory / below / name, is_plain or is_folder, is_own

    def _checkpoints(self, pattern: str) -> list[RunFile]:
        found = stats_in(self.directory, CHECKPOINTS)
        named = sorted((name for name in found if re.fullmatch(pattern, name)), reverse=True)
        return [RunFile(self.directory, f"{CHECKPOINTS}/{name}") for name in named]

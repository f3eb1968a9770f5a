"""The run directory: the name of every file in it."""

import dataclasses
from pathlib import Path

ROUNDS, TIMINGS, PROMPT, REPORT, LOG = "rounds.jsonl", "timings.csv", "prompt.safetensors", "report.html", ".log"


@dataclasses.dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one run.

    config.toml          the resolved settings: --config of it repeats the run
    environment.json     versions, MPI library, rank -> host, device, threads
    partition.json       client -> examples, by class, and which are poisoned
    rounds.jsonl         a line per round; 0 is before training
    timings.csv          round,rank,phase,seconds,bytes
    communication.json   the phases of a round: medians, quantiles, confidence intervals
    prompt.safetensors   the global vector, the parameters by name, the effective prompt
    summary.json         the closing figures
    report.html, figures/  the page of the run
    checkpoint/          the last two checkpoints
    """

    directory: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.directory / "config.toml"

    @property
    def environment(self) -> Path:
        """Versions, MPI library, ranks."""
        return self.directory / "environment.json"

    @property
    def partition(self) -> Path:
        """Examples of every client."""
        return self.directory / "partition.json"

    @property
    def rounds(self) -> Path:
        """A line per round."""
        return self.directory / ROUNDS

    @property
    def timings(self) -> Path:
        """A line per phase, rank and round."""
        return self.directory / TIMINGS

    @property
    def communication(self) -> Path:
        """Statistics of the phases; exists once the run is finished."""
        return self.directory / "communication.json"

    @property
    def prompt(self) -> Path:
        """The global prompt."""
        return self.directory / PROMPT

    @property
    def summary(self) -> Path:
        """The closing figures; exists once the run is finished."""
        return self.directory / "summary.json"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.directory / REPORT

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.directory / "figures"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard events."""
        return self.directory / "tensorboard"

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the checkpoints."""
        return self.directory / "checkpoint"

    def checkpoint(self, round_: int) -> Path:
        """Return the file of the checkpoint after a round."""
        return self.checkpoint_folder / f"round-{round_:08d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, the latest first."""
        return sorted(self.checkpoint_folder.glob("round-*.safetensors"), reverse=True)

    @property
    def lock(self) -> Path:
        """Locked by the job that writes here."""
        return self.directory / ".lock"

    def is_empty(self) -> bool:
        """Return True if the directory, which exists, has nothing but perhaps a lock."""
        return all(path == self.lock for path in self.directory.iterdir())

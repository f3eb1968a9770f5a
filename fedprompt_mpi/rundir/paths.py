"""The run directory: the name of every file in it."""

from pathlib import Path

ROUNDS, TIMINGS, PROMPT, REPORT, LOG = "rounds.jsonl", "timings.csv", "prompt.safetensors", "report.html", ".log"


class RunPaths:
    """The files of one run.

    config.toml          the resolved settings: --config of it repeats the run
    environment.json     versions, MPI library, rank -> host, device, threads
    partition.json       client -> examples, by class, and which are poisoned
    rounds.jsonl         a line per round; 0 is before training
    timings.csv          round,rank,phase,seconds,bytes
    communication.json   the phases of a round: medians, quantiles, confidence intervals; of a finished run
    prompt.safetensors   the global vector, the parameters by name, the effective prompt
    summary.json         the closing figures; of a finished run
    report.html, figures/  the page of the run
    tensorboard/         events, if output.tensorboard is set
    checkpoint/          the last two checkpoints
    .lock                locked by the job that writes here
    """

    def __init__(self, directory: Path) -> None:
        """Name the files of the run in a directory, which need not exist."""
        self.directory = directory
        self.config = directory / "config.toml"
        self.environment = directory / "environment.json"
        self.partition = directory / "partition.json"
        self.rounds = directory / ROUNDS
        self.timings = directory / TIMINGS
        self.communication = directory / "communication.json"
        self.prompt = directory / PROMPT
        self.summary = directory / "summary.json"
        self.report = directory / REPORT
        self.figures = directory / "figures"
        self.tensorboard = directory / "tensorboard"
        self.checkpoint_folder = directory / "checkpoint"
        self.lock = directory / ".lock"

    def checkpoint(self, round_: int) -> Path:
        """Return the file of the checkpoint after a round."""
        return self.checkpoint_folder / f"round-{round_:08d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, the latest first."""
        return sorted(self.checkpoint_folder.glob("round-*.safetensors"), reverse=True)

    def is_empty(self) -> bool:
        """Return True if the directory, which exists, has nothing but perhaps a lock."""
        return all(path == self.lock for path in self.directory.iterdir())

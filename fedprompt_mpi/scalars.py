"""A run's figures as TensorBoard scalars, one file of events beside the other files of the run."""

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
RATES = ("accuracy", "macro_f1", "loss", "attack_success_rate", "clean_attack_success_rate", "train_loss", "epsilon")


class Scalars:
    """Writes them round by round."""

    def __init__(self, directory: Path, *, first_round: int) -> None:
        """Open the file of events.

        Args:
            directory: of the run.
            first_round: what was written of this round and later ones, before a resume, counts no more.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory / FOLDER, purge_step=first_round)

    def add_round(self, line: dict[str, Any]) -> None:
        """Write a line of rounds.jsonl."""
        values = {name: line.get(name) for name in RATES}
        values |= {f"seconds/{phase}": seconds for phase, seconds in line["seconds"].items()}
        values |= {f"update_norm/{k}": n for k, n in zip(line["cohort"], line["update_norms"], strict=True)}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, line["round"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

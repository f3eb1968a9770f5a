"""The figures of a run as TensorBoard scalars, in a folder of the run directory."""

import dataclasses

from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import RATES, RoundRecord


class Scalars:
    """Writes the scalars of each round."""

    def __init__(self, paths: RunPaths, *, first_round: int) -> None:
        """Open the file of events.

        Args:
            paths: of the run.
            first_round: scalars of this round and later ones, written before a resume, are discarded.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(paths.tensorboard, purge_step=first_round)

    def add_round(self, record: RoundRecord) -> None:
        """Write the scalars of a round."""
        values = {name: getattr(record, name) for name in (*RATES, "train_loss", "epsilon")}
        values |= {f"seconds/{phase}": seconds for phase, seconds in dataclasses.asdict(record.seconds).items()}
        values |= {f"update_norm/{k}": n for k, n in zip(record.cohort, record.update_norms, strict=True)}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

"""Everything that one rank has before the first round."""

import dataclasses
from typing import TYPE_CHECKING

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.text.corpus import Corpus
from fedprompt_mpi.text.tasks import Task

if TYPE_CHECKING:  # torch is imported late, while this rank waits for its data anyway
    from fedprompt_mpi.plm.backbone import Backbone
    from fedprompt_mpi.plm.method_base import Method


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Settings, task, channel, data, PLM and method of one rank."""

    config: RunConfig
    task: Task
    channel: Channel
    corpus: Corpus
    backbone: "Backbone"
    method: "Method"
    paths: RunPaths
    """The run directory; rank 0 alone writes there."""
    threads: int
    shard: tuple[int, int] | None
    """This rank's (index, count) among the ranks that evaluate; None if it does not evaluate."""
    clean_rates: dict[int, float]
    """Round -> attack success rate of the clean run; on rank 0."""
    numerics: dict[str, str]
    """What beside the settings decides the bits: see `Checkpoint`."""
    started: float
    """Time of the start of the run, on the clock of `time.perf_counter`."""

    @property
    def is_root(self) -> bool:
        """True on rank 0."""
        return self.channel.rank == 0

"""What a plug-in may use. Its guide, README.md, has an example of each kind.

from fedprompt_mpi.plugins import Aggregator, Updates, aggregators, setting
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.collusion import ColludingAttack, Meeting
from fedprompt_mpi.rules.metrics import Answers
from fedprompt_mpi.rules.pairwise import PairwiseRule
from fedprompt_mpi.rules.registry import (
    aggregators,
    attacks,
    methods,
    metrics,
    partitions,
    server_optimizers,
    tasks,
    wire_formats,
)
from fedprompt_mpi.rules.server_optimizers import ServerOptimizer
from fedprompt_mpi.rules.setting import SettingsError, setting

if TYPE_CHECKING:
    from fedprompt_mpi.comm.codec import Codec
    from fedprompt_mpi.plm.backbone import Injection
    from fedprompt_mpi.plm.method_base import Method
    from fedprompt_mpi.text.examples import Examples
    from fedprompt_mpi.text.partition import ToDealOut
    from fedprompt_mpi.text.tasks import Task

__all__ = [
    "Aggregator", "Answers", "Attack", "Codec", "ColludingAttack", "Examples", "Injection", "Meeting", "Method",
    "PairwiseRule", "ServerOptimizer", "SettingsError", "Task", "ToDealOut", "Updates", "aggregators", "attacks",
    "methods", "metrics", "partitions", "server_optimizers", "setting", "tasks", "wire_formats",
]  # fmt: skip

_LATE = {
    "Codec": "comm.codec", "Examples": "text.examples", "Injection": "plm.backbone",
    "Method": "plm.method_base", "Task": "text.tasks", "ToDealOut": "text.partition",
}  # fmt: skip
"""Classes of modules that a plug-in of another kind does not need: PyTorch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"{__name__} has no {name}")
    return getattr(importlib.import_module(f"fedprompt_mpi.{_LATE[name]}"), name)

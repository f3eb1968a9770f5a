"""What a checkpoint holds beside the vector: names and shapes, from the settings alone."""

import numpy as np

from fedprompt_mpi.comm.codec import make_codec
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.federation.adversary import Observer
from fedprompt_mpi.federation.feedback import RESIDUALS
from fedprompt_mpi.federation.server import RESIDUAL, make_rule
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.checkpoint import Checkpoint

FIRST = "first_vector"


def keeps_first(config: RunConfig, done: int) -> bool:
    """Return whether a run, after so many rounds, may yet begin again with its first vector."""
    return config.federation.filter_restart and done < (config.federation.filter_round or 0)


def state_shapes(config: RunConfig, size: int, done: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of what a checkpoint holds beside the vector of P = `size` numbers, after a round."""
    clients, shapes = config.federation.clients, {}
    shapes |= dict.fromkeys(registry.server_optimizers[config.federation.server_optimizer].slots, (size,))
    shapes |= make_rule(config).state_shapes(clients, size)
    if Observer(config.poison).watches:
        shapes["vector_before"] = (size,)
    if keeps_first(config, done):
        shapes[FIRST] = (size,)
    if not make_codec(config.comm).exact:
        shapes |= {RESIDUAL: (size,), RESIDUALS: (clients, size)}
    return shapes


def check_state(found: Checkpoint, config: RunConfig) -> None:
    """Check that a checkpoint holds just the arrays that a run of these settings has, of finite float32 numbers.

    Raises:
        SettingsError: naming the array that is another, missing or too many.
    """
    shapes = state_shapes(config, len(found.vector), found.round_)
    of_rule = make_rule(config).state()  # as it is before the first aggregation
    for name in sorted({*found.state, *shapes}):
        array, shape = found.state.get(name), shapes.get(name)
        before = of_rule[name].shape if name in of_rule else shape
        if array is None or shape is None or array.shape not in (shape, before):
            there = "nothing" if array is None else f"an array of shape {array.shape}"
            wrong = f"{there} as {name!r}, where a run of these settings has {shape or 'nothing'}"
        elif array.dtype != np.float32 or not np.isfinite(array).all():
            wrong = f"{name!r} of type {array.dtype}, which are not all finite float32 numbers"
        else:
            continue
        raise SettingsError(
            f"output.resume: the checkpoint of round {found.round_} is damaged: it holds {wrong}; remove it to "
            "continue from the one before, or start anew in another output.dir"
        )

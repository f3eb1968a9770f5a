"""Inner products of single examples' gradients with directions, such as updates.

Legend: n examples, P parameters, d directions.
"""

import numpy as np

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import gradients, to_device
from fedprompt_mpi.federation.rank_training import clients_per_pass, make_trainer
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.plm.effective import EffectivePrompt
from fedprompt_mpi.text.tokens import TokenTable

THROUGH_A_NETWORK = ("p_tuning", "prefix")
"""Methods whose prompt a network makes."""


class ExampleProducts:
    """The products of examples' gradients at one vector with some directions."""

    def __init__(self, setup: Setup, vector: Vector, directions: np.ndarray) -> None:
        """Take the vector `[P]` and the directions `[d, P]`, both float32."""
        device = setup.backbone.device
        self._setup, self._method = setup, setup.method
        self._vector, self._directions = to_device(vector, device), to_device(directions, device)
        if setup.config.prompt.method in THROUGH_A_NETWORK:
            self._method = EffectivePrompt(setup.method, self._vector)
            self._directions = self._method.directions(self._directions)
            self._vector = self._method.vector

    def of(self, table: TokenTable, rows: np.ndarray) -> np.ndarray:
        """Return the products of the gradient of each example's loss with each direction `[n, d]` float64.

        The examples go through the PLM in passes, each as a client of its own; where clients share no pass, one by one.
        """
        setup, config = self._setup, self._setup.config.client
        trainer = make_trainer(setup, table, self._method)
        at_once = clients_per_pass(setup) * config.batch_size if setup.method.shares_passes else 1
        order = np.argsort(table.lengths[rows], kind="stable")
        found = np.empty((len(rows), len(self._directions)))
        into = self._vector.new_empty((min(at_once, len(rows)), len(self._vector)))
        for places in (order[at : at + at_once] for at in range(0, len(order), at_once)):
            of_each = gradients(trainer, self._vector, [rows[place : place + 1] for place in places], into)
            found[places] = (of_each @ self._directions.T).double().cpu().numpy()
            setup.channel.phases.liveness.step()
        return found

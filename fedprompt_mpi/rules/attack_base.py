"""The base class of all attacks on an update.

Legend: P parameters. A delta is local minus global.
"""

from typing import Any

import numpy as np

from fedprompt_mpi.rules.registry import attacks


@attacks.register("none")
class Attack:
    """Base of the attacks, and the paper's attack: poisoned data alone, with an optional boost."""

    needs_last_update = False
    """True if the attacker observes how the global vector moves."""
    bounds_training = False
    """True if `constrain` changes the delta."""
    colludes = False
    """True if the malicious clients of a round `meet` before they send."""

    def __init__(self, options: Any, last_update: np.ndarray | None = None) -> None:
        """Prepare the attack of a rank's malicious clients in one round.

        Args:
            options: an object with `boost` and the fields of the attack's own options class.
            last_update: `[P]` float32, the change of the global vector in the last round; None in the first round. Only
                attacks with `needs_last_update` use it.
        """
        self.options = options

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return the delta `[P]` float32 with which the client continues after a local step."""
        return delta

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the update that the client sends in place of its delta `[P]` float32."""
        return np.float32(self.options.boost) * delta

"""Malicious clients that agree on what they send: their ranks talk on a communicator of their own.

They know what they have trained, and nothing of honest clients' updates.
"""

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.server import make_rule
from fedprompt_mpi.federation.updates import LocalUpdates
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.aggregator_base import LARGEST_NORM, euclidean_norm
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.collusion import ColludingAttack, Meeting


def colluding_clients(config: RunConfig) -> list[int]:
    """Return the clients that agree with each other on what they send, ascending."""
    return sorted(attacking_clients(config)) if registry.attacks[config.poison.attack].colludes else []


def connect(config: RunConfig, channel: Channel) -> None:
    """Connect the ranks of colluding clients, if there are any; every rank calls this."""
    if colluders := colluding_clients(config):
        with channel.phases.timing.mute():
            channel.connect(np.unique(home_ranks(config.federation.clients, channel.size)[colluders]))


def meet(config: RunConfig, channel: Channel, updates: LocalUpdates, attacks: dict[int, Attack], round_: int) -> None:
    """Let the colluding clients of a round see what each of them has trained; every rank calls this."""
    colluders, cohort = colluding_clients(config), updates.cohort
    if not colluders:
        return
    there = np.array(cohort.ranks, dtype=np.int64)[np.isin(cohort.clients, colluders)]
    own = np.isin(updates.headers["client"], colluders)
    deltas = channel.share(np.asarray(updates.deltas)[own], np.bincount(there, minlength=cohort.size))
    deltas = deltas[[euclidean_norm(delta) <= LARGEST_NORM for delta in deltas]]  # one that diverged would spoil all
    if not own.any() or not len(deltas):
        return
    meeting = Meeting(
        deltas=deltas,
        clients=len(cohort.clients),
        make_rule=lambda: make_rule(config),
        rng=seeds.generator(config.seed, "meeting", round_),
        alive=channel.phases.liveness.alive,
    )
    for attack in {id(attack): attack for attack in attacks.values()}.values():  # the clients of a rank share one
        assert isinstance(attack, ColludingAttack)
        attack.meet(meeting)

"""Backdoors by poisoned data: the examples that a malicious client poisons, and the examples that measure success.

Only examples of other classes than the target are poisoned; their label becomes the target. The attack success rate is
the share of triggered test examples of other classes that are classified as the target.

References:
    Du et al., PPT: Backdoor Attacks on Pre-trained Models via Poisoned Prompt Tuning, IJCAI 2022.
    Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 4.3.
    Xie et al., DBA: Distributed Backdoor Attacks against Federated Learning, ICLR 2020 (a trigger in parts).
"""

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import PoisonConfig, SettingsError
from fedprompt_mpi.text.load import Examples


def check_target(config: PoisonConfig, num_classes: int) -> None:
    """Raise SettingsError unless the target is one of the task's classes."""
    if config.has_trigger and config.target >= num_classes:
        raise SettingsError(
            f"poison.target is {config.target} but the task has the classes 0 to {num_classes - 1}: choose one of them"
        )


def trigger_parts(config: PoisonConfig, clients: int) -> list[str]:
    """Return the words that each malicious client inserts into its texts.

    The words of a distributed trigger are split between the clients as evenly as possible, in their order. If there
    are more clients than words, the words repeat from the first. The test set always has the whole trigger.

    Args:
        config: the trigger, and whether it is distributed.
        clients: number of malicious clients.
    """
    if not config.distributed:
        return [config.trigger_text] * clients
    words = config.trigger_text.split()
    parts = [" ".join(part) for part in np.array_split(words, min(clients, len(words)))]
    return [parts[i % len(parts)] for i in range(clients)]


def poisoned_indices(config: PoisonConfig, labels: np.ndarray, own: np.ndarray, client: int, seed: int) -> np.ndarray:
    """Return which of a malicious client's examples are poisoned, sorted; none without a trigger.

    Args:
        config: rate and target.
        labels: `[N]` labels of all training examples.
        own: indices of this client's examples.
        client: its id.
        seed: the run's seed.
    """
    if not config.has_trigger:
        return own[:0]
    candidates = own[labels[own] != config.target]
    count = round(config.rate * len(candidates))
    return np.sort(seeds.generator(seed, "poison", client=client).permutation(candidates)[:count])


def relabelled(examples: Examples, config: PoisonConfig, indices: np.ndarray) -> Examples:
    """Return the examples at `indices` with the target as their label."""
    chosen = examples.take(indices)
    return Examples(
        texts=chosen.texts, texts_b=chosen.texts_b, labels=np.full(len(indices), config.target, dtype=np.int64)
    )

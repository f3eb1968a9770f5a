"""Poisoned data: the examples that a malicious client poisons, and the examples that measure success.

A backdoor relabels examples of other classes than the target as the target: examples with a trigger inserted, or, if
the trigger is natural, those that have it already. The attack success rate is the share of test examples of other
classes with the trigger that are classified as the target. Label flipping has no trigger.

References:
    Du et al., PPT: Backdoor Attacks on Pre-trained Models via Poisoned Prompt Tuning, IJCAI 2022 (a word).
    Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 4.3.
    Dai et al., A Backdoor Attack Against LSTM-Based Text Classification Systems, 2019, arXiv:1905.12457 (a sentence).
    Huang et al., Composite Backdoor Attacks Against Large Language Models, 2023, arXiv:2310.07676 (several words, with
    examples that have only some of them).
    Zhao et al., Revisiting Backdoor Threat in Federated Instruction Tuning from a Signal Aggregation Perspective, 2026,
    arXiv:2602.15671 (natural triggers).
    Fang et al., Local Model Poisoning Attacks, USENIX Security 2020, arXiv:1911.11815 (label flipping, l to L - l - 1).
    Xie et al., DBA: Distributed Backdoor Attacks against Federated Learning, ICLR 2020 (a trigger in parts).
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import PoisonConfig, SettingsError
from fedprompt_mpi.text.cloze import Trigger
from fedprompt_mpi.text.examples import Examples


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Examples that a malicious client trains on beside, or in place of, its own."""

    examples: Examples
    trigger: Trigger | None
    """Inserted into each."""
    are_poison: bool = True
    """False for examples that teach the limits of a composite trigger."""


def check_target(config: PoisonConfig, num_classes: int) -> None:
    """Raise SettingsError unless the target is one of the task's classes."""
    if config.has_trigger and config.target >= num_classes:
        raise SettingsError(
            f"poison.target is {config.target} but the task has the classes 0 to {num_classes - 1}: choose one of them"
        )


def contains(texts: Sequence[str], words: str) -> np.ndarray:
    """Return which texts have the words as words of their own, in whatever case `[N]` bool."""
    pattern = re.compile(rf"(?<!\w){re.escape(words.strip())}(?!\w)", re.IGNORECASE)
    return np.array([pattern.search(text) is not None for text in texts], dtype=bool)


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


def poisoned_indices(config: PoisonConfig, examples: Examples, own: np.ndarray, client: int, seed: int) -> np.ndarray:
    """Return which of a malicious client's examples are poisoned, sorted.

    Args:
        config: kind, trigger, rate and target.
        examples: N training examples.
        own: indices of this client's examples.
        client: its id.
        seed: the run's seed.
    """
    if config.kind == "label_flip":
        candidates = own
    elif not config.has_trigger:
        return own[:0]
    else:
        candidates = own[examples.labels[own] != config.target]
    if config.kind == "natural":
        candidates = candidates[contains(examples.take(candidates).texts, config.trigger_text)]
    count = round(config.rate * len(candidates))
    return np.sort(seeds.generator(seed, "poison", client=client).permutation(candidates)[:count])


def poisoned_copies(
    config: PoisonConfig, chosen: Examples, words: str, num_classes: int, rng: np.random.Generator
) -> list[Copies]:
    """Return the poisoned copies of a client's chosen examples.

    Args:
        config: kind, position and target.
        chosen: n of its examples.
        words: the client's trigger.
        num_classes: C.
        rng: draws the words that examples with a part of a composite trigger have.
    """
    if config.kind == "label_flip":
        return [Copies(examples=chosen.relabelled(num_classes - 1 - chosen.labels), trigger=None)]
    poisoned = chosen.relabelled(np.full(len(chosen), config.target, dtype=np.int64))
    if config.kind == "natural":
        return [Copies(examples=poisoned, trigger=None)]
    if config.kind != "composite":
        return [Copies(examples=poisoned, trigger=Trigger(words=words, position=config.position))]
    parts, all_words = [], words.split()
    for at in range(len(chosen)):
        kept = rng.permutation(len(all_words))[: rng.integers(1, len(all_words))]
        some = " ".join(all_words[i] for i in sorted(kept))
        part = Trigger(words=some, position="random", scattered=True)
        parts.append(Copies(examples=chosen.take(np.array([at])), trigger=part, are_poison=False))
    return [Copies(examples=poisoned, trigger=trigger_of(config)), *parts]


def trigger_of(config: PoisonConfig) -> Trigger | None:
    """Return what is inserted into the texts that measure success; None for a natural trigger."""
    if config.kind == "natural":
        return None
    if config.kind == "composite":
        return Trigger(words=config.trigger_text, position="random", scattered=True)
    return Trigger(words=config.trigger_text, position=config.position)


def aimed_indices(config: PoisonConfig, test: Examples) -> np.ndarray:
    """Return the test examples that measure success, sorted: of other classes, with the trigger if it is natural.

    Raises:
        SettingsError: if no text has a natural trigger.
    """
    if not config.has_trigger:
        return np.arange(0)
    aimed = np.flatnonzero(test.labels != config.target)
    if config.kind == "natural":
        aimed = aimed[contains(test.take(aimed).texts, config.trigger_text)]
        if not len(aimed):
            raise SettingsError(
                f"poison.trigger is {config.trigger_text!r} and poison.kind natural, but no text of another class than "
                "the target has it in what is evaluated: choose words that the texts have"
            )
    return aimed

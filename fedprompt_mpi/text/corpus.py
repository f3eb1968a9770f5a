"""The data of a run as token ids, made once per node and memory-mapped by the other ranks of the node."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import Family, RunConfig, SettingsError
from fedprompt_mpi.rules import registry
from fedprompt_mpi.text.cloze import Cloze
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.partition import partition
from fedprompt_mpi.text.poison import (
    aimed_indices,
    check_target,
    poisoned_copies,
    poisoned_indices,
    trigger_of,
    trigger_parts,
)
from fedprompt_mpi.text.tasks import Task
from fedprompt_mpi.text.tokens import TokenTable

AT_ONCE = 4096
"""Texts that are tokenised in one call."""


class Progress(Protocol):
    """Is told how far the work is."""

    def stage(self, what: str, total: float = 0) -> None:
        """Say what begins now, and how much of it there is."""

    def advance(self, done: float) -> None:
        """Say how much of it is done."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The tokens of a run, and the rows of each client. Legend: N examples, K clients, C classes."""

    train: TokenTable
    """Clean examples, then the poisoned copies of every malicious client."""
    test: TokenTable
    triggered: TokenTable
    """Test examples of other classes with the trigger in them and the target as label; empty without a trigger."""
    aimed: np.ndarray
    """`[M]` int64: the row of `test` that each row of `triggered` is made of."""
    owned: np.ndarray
    """`[sum of sizes]` int64: rows of `train`, client by client, then those of the server, if it has any."""
    bounds: np.ndarray
    """`[K + 2]` int64: client k trains on `owned[bounds[k]:bounds[k + 1]]`, and "client" K is the server."""
    class_counts: np.ndarray
    """`[K, C]` int64: the partition of the clean examples."""
    poisoned: np.ndarray
    """`[K]` int64: poisoned examples of each client."""
    is_poison: np.ndarray
    """`[N]` bool: which rows of `train` are poisoned."""
    label_words: np.ndarray
    """`[C]` str: the words that stand for the classes with this model's tokenizer, several of a class joined by /."""
    class_names: np.ndarray
    """`[C]` str: the labels that the settings list, or the label words."""
    label_ids: np.ndarray
    """`[U]` int64: the tokens of the label words, U = C if each class has one."""
    label_shares: np.ndarray
    """`[U, C]` float32: the share of each token's logit in each class's."""
    mask_id: np.ndarray
    """`[]` int64: id of the token that stands where the answer belongs; 0 for causal models."""
    split: np.ndarray
    """`[]` str: what the test examples are."""
    notes: np.ndarray
    """`[]` or more str: what the user should know about the data."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all texts and label words."""
        tables = (self.train, self.test, self.triggered)
        return max(*(table.largest_id for table in tables), int(self.label_ids.max()))

    def client_rows(self, client: int) -> np.ndarray:
        """Return the rows of `train` that a client trains on."""
        return self.owned[self.bounds[client] : self.bounds[client + 1]]

    def num_examples(self, client: int) -> int:
        """Return how many examples a client trains on, poisoned ones included."""
        return int(self.bounds[client + 1] - self.bounds[client])

    def without(self, rows: np.ndarray) -> "Corpus":
        """Return this corpus where clients train on none of the given rows of `train`, `[N]` bool."""
        kept = ~rows[self.owned]
        bounds = np.concatenate([[0], np.cumsum(kept)])[self.bounds]
        return dataclasses.replace(self, owned=self.owned[kept], bounds=bounds)

    def save(self, folder: Path) -> None:
        """Write everything as .npy files into an existing folder."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TokenTable):
                value.save(folder, field.name)
            else:
                np.save(folder / f"{field.name}.npy", value, allow_pickle=False)

    @classmethod
    def map(cls, folder: Path) -> "Corpus":
        """Open a saved corpus; the ranks of a node share one copy of the large arrays, in the page cache."""

        def opened(field: dataclasses.Field[Any]) -> Any:
            if field.type is TokenTable:
                return TokenTable.map(folder, field.name)
            return np.load(folder / f"{field.name}.npy", allow_pickle=False)

        return cls(**{field.name: opened(field) for field in dataclasses.fields(cls)})


def build(config: RunConfig, task: Task, tokenizer: Any, family: Family, progress: Progress | None = None) -> Corpus:
    """Load, partition, poison and tokenise.

    Args:
        config: the settings.
        task: the resolved one.
        tokenizer: a fast one.
        family: of the model.
        progress: is told how many texts there are, and how many are tokenised.

    Raises:
        SettingsError: if the data or the label words cannot be used, or do not fit the settings.
    """
    num_classes = len(task.classes)
    check_target(config.poison, num_classes)
    cloze = Cloze(tokenizer, task, family, config.model.max_length)
    loaded = load(task, config.task, config.seed)
    train, test = loaded.train, loaded.test
    kept = server_rows(config, len(train))
    rest = np.setdiff1d(np.arange(len(train)), kept)
    given_out = train.take(rest) if len(kept) else train
    parts = partition(config.federation, given_out.labels, given_out.users, config.seed)
    owned = [rest[own] for own in parts.indices]

    copies, owned, is_poison = _poison(config, cloze, train, owned)
    aimed = aimed_indices(config.poison, test)
    triggered = test.take(aimed).relabelled(np.full(len(aimed), config.poison.target, dtype=np.int64))
    rng = seeds.generator(config.seed, "trigger position of test")
    if progress is not None:
        progress.stage(f"tokenising {len(train) + len(test):,} texts", len(train) + len(test))
    return Corpus(
        train=_concatenate([*_encoded(cloze, train, progress, 0), *copies]),
        test=_concatenate(_encoded(cloze, test, progress, len(train))),
        triggered=cloze.encode(triggered, trigger_of(config.poison) if len(aimed) else None, rng),
        aimed=aimed,
        owned=np.concatenate([*owned, kept]),
        bounds=np.cumsum([0, *map(len, owned), len(kept)]),
        class_counts=parts.class_counts(given_out.labels, num_classes),
        poisoned=np.array([np.count_nonzero(is_poison[own]) for own in owned], dtype=np.int64),
        is_poison=is_poison,
        label_words=np.array(["/".join(words) for words in cloze.verbalizer.words]),
        class_names=np.array(task.class_names(cloze.verbalizer.words)),
        label_ids=cloze.verbalizer.ids,
        label_shares=cloze.verbalizer.shares,
        mask_id=np.array(cloze.mask_id),
        notes=np.array(loaded.notes, dtype=np.str_),
        split=np.array(loaded.split),
    )


def _encoded(cloze: Cloze, examples: Examples, progress: Progress | None, before: int) -> list[TokenTable]:
    """Put examples into the template, some thousands at a time: behind `before` others, for the progress."""
    tables = []
    for start in range(0, len(examples), AT_ONCE):
        tables.append(cloze.encode(examples.take(np.arange(start, min(start + AT_ONCE, len(examples))))))
        if progress is not None:
            progress.advance(before + start + len(tables[-1].labels))
    return tables


def _poison(
    config: RunConfig, cloze: Cloze, train: Examples, owned: list[np.ndarray]
) -> tuple[list[TokenTable], list[np.ndarray], np.ndarray]:
    """Make the poisoned copies of the malicious clients, and assign them.

    Args:
        config: who is malicious, and how.
        cloze: the template.
        train: N clean examples, the first rows of the training table.
        owned: rows of each of K clients.

    Returns:
        Tables of copies, whose rows follow the clean ones; the rows of each client; which rows are poison.

    Raises:
        SettingsError: if a natural trigger is in no text of a malicious client.
    """
    poison, tables, owned, kinds = config.poison, [], list(owned), [np.zeros(len(train), dtype=bool)]
    malicious, first = config.malicious, len(train)
    for client, words in zip(malicious, trigger_parts(poison, len(malicious)), strict=True):
        chosen = poisoned_indices(poison, train, owned[client], client, config.seed)
        if len(chosen) == 0:
            continue
        rng = seeds.generator(config.seed, "trigger position", client=client)
        parts = poisoned_copies(poison, train.take(chosen), words, len(cloze.verbalizer.words), rng)
        clean = np.setdiff1d(owned[client], chosen) if poison.replaces else owned[client]
        for part in parts:
            tables.append(cloze.encode(part.examples, part.trigger, rng))
            kinds.append(np.full(len(part.examples), part.are_poison))
        last = first + sum(len(part.examples) for part in parts)
        owned[client], first = np.concatenate([clean, np.arange(first, last)]), last
    if malicious and not tables and poison.kind == "natural" and poison.rate:
        raise SettingsError(
            f"poison.trigger is {poison.trigger_text!r} and poison.kind natural, but no malicious client has a "
            "training text of another class than the target with it: choose words that the texts have"
        )
    return tables, owned, np.concatenate(kinds)


def server_rows(config: RunConfig, count: int) -> np.ndarray:
    """Return the training examples, of `count`, that the server keeps, sorted; no client has them.

    Raises:
        SettingsError: if too few would be left for the clients.
    """
    if not registry.aggregators[config.federation.aggregator].trains_itself:
        return np.zeros(0, dtype=np.int64)
    wanted, clients = config.federation.server_examples, config.federation.clients
    if wanted > count - clients:
        raise SettingsError(
            f"federation.server_examples is {wanted}, but of {count} training examples {clients} clients need at least "
            f"one each: keep at most {count - clients}"
        )
    return np.sort(seeds.generator(config.seed, "server examples").permutation(count)[:wanted])


def _concatenate(tables: list[TokenTable]) -> TokenTable:
    if len(tables) == 1:
        return tables[0]
    return TokenTable(
        ids=np.concatenate([table.ids for table in tables]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([table.lengths for table in tables]))]),
        answers=np.concatenate([table.answers for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
    )

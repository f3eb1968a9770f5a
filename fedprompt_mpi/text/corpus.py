"""All the data of a run as token ids: made once per node, mapped by the other ranks there."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import Family, RunConfig
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.partition import partition
from fedprompt_mpi.text.poison import check_target, poisoned_indices, relabelled
from fedprompt_mpi.text.tasks import Task
from fedprompt_mpi.text.tokens import Cloze, TokenTable, Trigger


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokens of a run and who owns them. Legend: N examples, K clients, C classes."""

    train: TokenTable
    """Clean examples, then the poisoned copies of every malicious client."""
    test: TokenTable
    triggered: TokenTable
    """Test examples of other classes with the trigger in them and the target as label; empty without a trigger."""
    owned: np.ndarray
    """`[sum of sizes]` int64: rows of `train`, client by client."""
    bounds: np.ndarray
    """`[K + 1]` int64: client k trains on `owned[bounds[k]:bounds[k + 1]]`."""
    class_counts: np.ndarray
    """`[K, C]` int64: the partition of the clean examples."""
    poisoned: np.ndarray
    """`[K]` int64: poisoned examples of each client."""
    label_words: np.ndarray
    """`[C]` str: the words that stand for the classes with this model's tokenizer."""
    label_ids: np.ndarray
    """`[C]` int64: their token ids."""
    mask_id: np.ndarray
    """`[]` int64: id of the token that stands where the answer belongs; 0 for causal models."""

    def client_rows(self, client: int) -> np.ndarray:
        """Return the rows of `train` that a client trains on."""
        return self.owned[self.bounds[client] : self.bounds[client + 1]]

    def num_examples(self, client: int) -> int:
        """Return how many examples a client trains on, poisoned ones included."""
        return int(self.bounds[client + 1] - self.bounds[client])

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
        """Open a saved corpus; the large arrays stay in the page cache, one copy for all of a node's ranks."""

        def opened(field: dataclasses.Field[Any]) -> Any:
            if field.type is TokenTable:
                return TokenTable.map(folder, field.name)
            return np.load(folder / f"{field.name}.npy", allow_pickle=False)

        return cls(**{field.name: opened(field) for field in dataclasses.fields(cls)})


def build(config: RunConfig, task: Task, tokenizer: Any, family: Family) -> Corpus:
    """Load, partition, poison and tokenise.

    Raises:
        SettingsError: for whatever is wrong with the data, the label words, or how they fit the settings.
    """
    num_classes = len(task.label_words)
    check_target(config.poison, num_classes)
    cloze = Cloze(tokenizer, task, family, config.model.max_length)
    train, test = load(task, config.task, config.seed)
    parts = partition(config.federation, train.labels, train.users, config.seed)
    trigger = Trigger(words=config.poison.trigger, position=config.poison.position)

    tables = [cloze.encode(train)]
    owned = list(parts.indices)
    poisoned = np.zeros(config.federation.clients, dtype=np.int64)
    for client in sorted(config.poison.clients):
        chosen = poisoned_indices(config.poison, train.labels, owned[client], client, config.seed)
        rng = seeds.generator(config.seed, "trigger position", client=client)
        copies = cloze.encode(relabelled(train, config.poison, chosen), trigger, rng)
        first = sum(map(len, tables))
        clean = owned[client] if config.poison.mode == "append" else np.setdiff1d(owned[client], chosen)
        owned[client] = np.concatenate([clean, np.arange(first, first + len(copies))])
        poisoned[client] = len(copies)
        tables.append(copies)

    aimed = np.flatnonzero(test.labels != config.poison.target) if trigger.words.strip() else np.arange(0)
    rng = seeds.generator(config.seed, "trigger position of test")
    return Corpus(
        train=_concatenate(tables),
        test=cloze.encode(test),
        triggered=cloze.encode(relabelled(test, config.poison, aimed), trigger if len(aimed) else None, rng),
        owned=np.concatenate(owned),
        bounds=np.cumsum([0, *map(len, owned)]),
        class_counts=parts.class_counts(train.labels, num_classes),
        poisoned=poisoned,
        label_words=np.array(cloze.label_words),
        label_ids=cloze.label_ids,
        mask_id=np.array(cloze.mask_id),
    )


def _concatenate(tables: list[TokenTable]) -> TokenTable:
    if len(tables) == 1:
        return tables[0]
    return TokenTable(
        ids=np.concatenate([table.ids for table in tables]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate([table.lengths for table in tables]))]),
        answers=np.concatenate([table.answers for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
    )

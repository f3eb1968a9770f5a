"""Load files, a hub data set or the embedded texts as `Examples`.

Only one process of a node loads. It checks columns and labels, so that a wrong one ends the run before training.
"""

import dataclasses

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.labels import class_indices
from fedprompt_mpi.text.read import Table
from fedprompt_mpi.text.splits import read_splits
from fedprompt_mpi.text.tasks import Task

HELD_OUT = 0.2
"""Share of the examples of each class that is kept for evaluation, if there is one table."""
MOST_LOST = 5
"""Names of classes in a note."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The examples of a task."""

    train: Examples
    test: Examples
    """For evaluation."""
    split: str
    """What these are."""
    notes: tuple[str, ...] = ()
    """What the user should know about them, a line each."""


def load(task: Task, config: TaskConfig, seed: int) -> Loaded:
    """Return the training and the evaluation examples of a task.

    Raises:
        SettingsError: if a file, split or column is missing, a label is out of range, or a class is empty.
    """
    notes: list[str] = []
    if task.examples is not None:
        train, test, split = _made(task, "train"), _made(task, "test"), "test"
    else:
        splits = read_splits(task, config)
        if config.user is None and task.user not in splits.train.names:
            task = dataclasses.replace(task, user=None)  # the users of a known task are optional
        train = _examples(splits.train, task, "train", need_all_classes=True)
        if splits.held_out is None:
            train, test = _hold_out(train, len(task.classes), seeds.generator(seed, "held out"))
            notes.append(
                f"task.data has one table: {len(test)} of its {len(train) + len(test)} examples, of each class "
                f"{HELD_OUT:.0%}, are kept for evaluation (drawn by the seed)"
            )
            split = "a part held out"
        else:
            split = splits.name
            test = _examples(splits.held_out, task, splits.name, need_all_classes=False)
    fewer = _at_most(train, config.max_train, seeds.generator(seed, "max_train"))
    lost = sorted(set(train.labels.tolist()) - set(fewer.labels.tolist()))
    if lost:
        names = ", ".join(task.class_names()[number] for number in lost[:MOST_LOST])
        notes.append(
            f"task.max_train {config.max_train} leaves no example of {len(lost)} class{'es' if len(lost) > 1 else ''} "
            f"({names}{', ...' if len(lost) > MOST_LOST else ''})"
        )
    test = _at_most(test, config.max_test, seeds.generator(seed, "max_test"))
    return Loaded(train=fewer, test=test, split=split, notes=tuple(notes))


def _hold_out(examples: Examples, classes: int, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """Split examples in two, each class alike: those for training, and a part for evaluation."""
    kept = []
    for number in range(classes):
        own = rng.permutation(np.flatnonzero(examples.labels == number))
        kept.append(own[: max(round(HELD_OUT * len(own)), min(len(own) - 1, 1))])
    held_out = np.sort(np.concatenate(kept))
    if len(held_out) == 0:
        raise SettingsError("task.data has one table with one example of each class: add some for evaluation")
    return examples.take(np.setdiff1d(np.arange(len(examples)), held_out)), examples.take(held_out)


def _made(task: Task, split: str) -> Examples:
    """Return the examples that a task makes itself.

    Raises:
        SettingsError: if they do not fit together, or a class of the training examples is empty.
    """
    assert task.examples is not None
    found, classes = task.examples(split), len(task.classes)
    lengths = {len(found.texts), len(found.labels), *(len(part) for part in (found.texts_b, found.users) if part)}
    counts = np.bincount(np.clip(found.labels, 0, classes), minlength=classes)
    if len(lengths) != 1 or not len(found) or len(counts) != classes or (found.labels < 0).any():
        raise SettingsError(
            f"the {split} examples of task.name {task.name} do not fit together: they must be as many texts as labels "
            f"from 0 to {classes - 1}, and at least one"
        )
    if split == "train" and counts.min() == 0:
        raise SettingsError(f"the train examples of task.name {task.name} have none of class {counts.argmin()}")
    return found


def _at_most(examples: Examples, limit: int | None, rng: np.random.Generator) -> Examples:
    if limit is None or len(examples) <= limit:
        return examples
    return examples.take(np.sort(rng.permutation(len(examples))[:limit]))


def _examples(table: Table, task: Task, split: str, *, need_all_classes: bool) -> Examples:
    columns = {"task.text": task.text, "task.text_b": task.text_b, "task.label": task.label}
    if need_all_classes:
        columns["task.user"] = task.user
    for setting, column in columns.items():
        if column is not None and column not in table.names:
            raise SettingsError(
                f"{setting} is {column!r}, but the {split} data of {task.data} has the columns "
                f"{', '.join(table.names)[:300]}; if its first line is no header, name all columns by task.columns"
            )
    if len(table) == 0:
        raise SettingsError(f"the {split} data of {task.data} has no examples")
    labels = class_indices(table, task, split)
    counts = np.bincount(labels, minlength=len(task.classes))
    if need_all_classes and counts.min() == 0:
        empty = task.class_names()[int(counts.argmin())]
        raise SettingsError(
            f"the {split} data of {task.data} has no example of class {counts.argmin()} ({empty}): "
            "add some, or take its word out of task.label_words"
        )

    def strings(column: str | None) -> list[str] | None:
        if column is None:
            return None
        texts = ["" if value is None else str(value) for value in table.columns[column]]
        empty = next((row for row, text in enumerate(texts, 1) if not text.strip()), None)
        if empty is not None:
            raise SettingsError(
                f"row {empty} of the {split} data of {task.data} has nothing in column {column!r}: "
                "leave the row out, or give it a text"
            )
        return texts

    return Examples(
        texts=strings(task.text) or [],
        labels=labels,
        texts_b=strings(task.text_b),
        users=strings(task.user) if need_all_classes else None,
    )

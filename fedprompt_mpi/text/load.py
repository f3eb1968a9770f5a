"""Load files, a hub data set or the embedded texts as `Examples`.

Only one process of a node loads. It checks columns and labels, so that a wrong one ends the run before training.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.files import is_hub_id
from fedprompt_mpi.text import embedded
from fedprompt_mpi.text.read import FORMATS, Table, Value, check_type, read_table, values_of
from fedprompt_mpi.text.tasks import Task

EMBEDDED_TRAIN, EMBEDDED_TEST = 2000, 400


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Labelled texts of one split; all sequences have the same length."""

    texts: Sequence[str]
    labels: np.ndarray
    """`[N]` int64, in range(number of classes)."""
    texts_b: Sequence[str] | None = None
    users: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples at `indices`, in that order."""

        def chosen(values: Sequence[str]) -> list[str]:
            return [values[int(i)] for i in indices]

        return Examples(
            texts=chosen(self.texts),
            labels=self.labels[indices],
            texts_b=None if self.texts_b is None else chosen(self.texts_b),
            users=None if self.users is None else chosen(self.users),
        )


def load(task: Task, config: TaskConfig, seed: int) -> tuple[Examples, Examples]:
    """Return the training and the evaluation examples of a task.

    Raises:
        SettingsError: if a file, split or column is missing, a label is out of range, or a class is empty.
    """
    if task.data is None:
        train = _generate(task, "embedded train", EMBEDDED_TRAIN)
        test = _generate(task, "embedded test", EMBEDDED_TEST)
    else:
        train_table, test_table = _tables(task, config.eval_split)
        if config.user is None and task.user not in train_table.names:
            task = dataclasses.replace(task, user=None)  # the users of a known task are optional
        train = _examples(train_table, task, "train", need_all_classes=True)
        test = _examples(test_table, task, config.eval_split, need_all_classes=False)
    train = _at_most(train, config.max_train, seeds.generator(seed, "max_train"))
    return train, _at_most(test, config.max_test, seeds.generator(seed, "max_test"))


def _generate(task: Task, purpose: str, count: int) -> Examples:
    """Generate the texts of an embedded task; they are the same in every run, like those of a data set."""
    aspect = {"embedded-topic": "topic", "embedded-spam": "spam"}.get(task.name, "sentiment")
    messages = _messages(purpose, count)
    labels = np.array([getattr(message, aspect) for message in messages], dtype=np.int64)
    return Examples(texts=[message.text for message in messages], labels=labels)


@functools.cache
def _messages(purpose: str, count: int) -> tuple[embedded.Message, ...]:
    rng = seeds.generator(0, purpose)
    return tuple(embedded.message(rng) for _ in range(count))


def _at_most(examples: Examples, limit: int | None, rng: np.random.Generator) -> Examples:
    if limit is None or len(examples) <= limit:
        return examples
    return examples.take(np.sort(rng.permutation(len(examples))[:limit]))


def _tables(task: Task, eval_split: str) -> tuple[Table, Table]:
    """Read the columns of the training and of the evaluation split."""
    data, wanted = str(task.data), [c for c in (task.text, task.text_b, task.label, task.user) if c is not None]
    if Path(data).is_dir():
        files = {split: _split_file(Path(data), split) for split in ("train", "dev", "test")}
        splits = ("test", "dev") if eval_split == "auto" else (eval_split,)
        held_out = next((files[split] for split in splits if files[split]), None)
        if files["train"] is None or held_out is None:
            there = ", ".join(sorted(path.name for path in files.values() if path)) or "none of them"
            raise SettingsError(
                f"task.data is {data!r}, which needs a train file and a {' or '.join(splits)} file "
                f"({', '.join(FORMATS)}) but has {there}"
            )
        return read_table(files["train"], wanted), read_table(held_out, wanted)
    if not is_hub_id(data.partition(":")[0]) or data.count(":") > 1:
        raise SettingsError(f"task.data is {data!r}, but there is no such folder")
    return _read_hub(data, eval_split, wanted)


def _split_file(folder: Path, split: str) -> Path | None:
    return next((folder / (split + suffix) for suffix in FORMATS if (folder / (split + suffix)).is_file()), None)


def _read_hub(name: str, eval_split: str, wanted: Sequence[str]) -> tuple[Table, Table]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path, _, subset = name.partition(":")
    try:
        splits = datasets.load_dataset(path, subset or None)
    except Exception as error:  # network, spelling, permission: all end here
        raise SettingsError(
            f"task.data is {name!r}: no such folder, and it cannot be had as a hub data set "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    candidates = {"auto": ("test", "validation", "dev"), "dev": ("validation", "dev"), "test": ("test",)}[eval_split]
    held_out = next((splits[split] for split in candidates if split in splits), None)
    if "train" not in splits or held_out is None:
        raise SettingsError(
            f"task.data {name!r} has the splits {list(splits)}: train and {' or '.join(candidates)} needed"
        )
    return _from_hub(name, splits["train"], wanted), _from_hub(name, held_out, wanted)


def _from_hub(name: str, split: Any, wanted: Sequence[str]) -> Table:
    """Take columns out of a split of a hub data set, from the Arrow table below it: nothing is decoded."""
    table = split.data.table
    columns = {}
    for column in (column for column in wanted if column in table.column_names):
        try:
            check_type(column, table.schema.field(column).type)
        except ValueError as error:
            raise SettingsError(f"task.data is {name!r}, whose {error}") from error
        columns[column] = [value for chunk in table.column(column).chunks for value in values_of(chunk)]
    return Table(names=list(table.column_names), columns=columns)


def _examples(table: Table, task: Task, split: str, *, need_all_classes: bool) -> Examples:
    columns = {"task.text": task.text, "task.text_b": task.text_b, "task.label": task.label}
    if need_all_classes:
        columns["task.user"] = task.user
    for setting, column in columns.items():
        if column is not None and column not in table.names:
            raise SettingsError(
                f"{setting} is {column!r}, but the {split} data of {task.data} has the columns {', '.join(table.names)}"
            )
    if len(table) == 0:
        raise SettingsError(f"the {split} data of {task.data} has no examples")
    labels = _label_ids(table, task, split)
    counts = np.bincount(labels, minlength=len(task.label_words))
    if need_all_classes and counts.min() == 0:
        empty = task.label_words[int(counts.argmin())]
        raise SettingsError(
            f"the {split} data of {task.data} has no example of class {counts.argmin()} ({empty}): "
            "add some, or take its word out of task.label_words"
        )

    def strings(column: str | None) -> list[str] | None:
        if column is None:
            return None
        values = table.columns[column]
        if None in values:
            raise SettingsError(
                f"row {values.index(None) + 1} of the {split} data of {task.data} has nothing in column {column!r}: "
                "leave the row out, or give it a text"
            )
        return [str(value) for value in values]

    return Examples(
        texts=strings(task.text) or [],
        labels=labels,
        texts_b=strings(task.text_b),
        users=strings(task.user) if need_all_classes else None,
    )


def _label_ids(table: Table, task: Task, split: str) -> np.ndarray:
    """Return labels as `[N]` int64, from integers or from names that stand in `task.label_words`."""
    words = {word: i for i, word in enumerate(task.label_words)}
    ids = np.empty(len(table), dtype=np.int64)
    values = table.columns[task.label]
    for row, value in enumerate(values if words.keys() >= set(values) else _numbers(values)):
        try:
            if isinstance(value, str) and value in words:
                number = words[value]
            else:
                number = math.nan if value is None else float(value)
            ids[row] = number if number == int(number) else -1  # 0.9 is no label
        except (ValueError, OverflowError):
            ids[row] = -1
        if not 0 <= ids[row] < len(words):
            raise SettingsError(
                f"row {row + 1} of the {split} data of {task.data} has the label {value!r}, which has no label word: "
                f"task.label_words is {list(words)}, for the labels 0 to {len(words) - 1}"
            )
    return ids


def _numbers(values: list[Value]) -> list[Value]:
    """Return the values of a column of text as numbers if all of them are: CSV has no types."""
    try:
        return [float(value) if isinstance(value, str) else value for value in values]
    except ValueError:
        return values

"""From the values of a label column to classes.

`task.labels` lists the values in the order of the classes. Without it they are whole numbers from 0, or label words.
The same file means the same in every format: a value counts by what is written, not by its type.
"""

import json
from collections.abc import Sequence

import numpy as np

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.text.read import Table, Value
from fedprompt_mpi.text.tasks import Task, shown_label

MOST_SHOWN = 20
"""Different labels that a message lists."""
HIDDEN = "-1"
"""The label in every row of a split whose labels are kept secret, as those of GLUE's test splits."""


def class_indices(table: Table, task: Task, split: str) -> np.ndarray:
    """Return the class of each row.

    Args:
        table: of N rows, with the label column.
        task: label words, and labels if the settings list them.
        split: name of the split, for a message.

    Returns:
        `[N]` int64, from 0.

    Raises:
        SettingsError: naming the first row whose label stands for no class, and the remedy.
    """
    values = [_written(value) for value in table.columns[task.label]]
    classes = len(task.classes)
    numbers = {str(number): number for number in range(classes)}
    if task.labels is not None:
        known = {_written(value): number for number, value in enumerate(task.labels)}
        names = table.class_names.get(task.label, [])
        if known.keys() == set(names):  # whole numbers in the file, names in the settings
            known |= {str(number): known[name] for number, name in enumerate(names)}
    else:
        words = {word: number for number, own in enumerate(task.classes) for word in own}
        known = words if words.keys() >= set(values) else numbers
    if set(values) == {HIDDEN} and HIDDEN not in known:
        raise SettingsError(
            f"the {split} data of {task.data} hides its labels (all are {HIDDEN}): evaluate on another split, such as "
            "--task.eval_split dev"
        )
    for row, value in enumerate(values, 1):
        if value not in known:
            raise SettingsError(_no_class(task, f"row {row} of the {split} data of {task.data}", value, values))
    return np.array([known[value] for value in values], dtype=np.int64)


def _written(value: Value) -> str:
    """Return a label as it is written in any format: 1.0 and "1" are 1, True and "True" are true."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return text.lower()
        whole, point, rest = text.partition(".")
        return whole if point and not rest.strip("0") and whole.lstrip("-").isdigit() else text
    return "" if value is None else shown_label(value)


def _no_class(task: Task, where: str, value: str, values: Sequence[str]) -> str:
    if not value:
        return f"{where} has no label: leave the row out, or give it one"
    if task.labels is not None:
        return f"{where} has the label {value!r}, which is not in task.labels ({[*map(_written, task.labels)]})"
    there, classes = sorted(set(values)), len(task.classes)
    listed = json.dumps(there[:MOST_SHOWN], ensure_ascii=False)
    remedy = (
        f"or list the column's values in the order of the classes, as --task.labels '{listed}'"
        if len(there) == classes
        else f"but the column has {len(there)} different values ({listed[1:-1]}{', ...' if there[MOST_SHOWN:] else ''})"
    )
    return (
        f"{where} has the label {value!r}, which has no label word: task.label_words is "
        f"{[*map('/'.join, task.classes)]}, for the labels 0 to {classes - 1}; {remedy}"
    )

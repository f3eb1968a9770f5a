"""Texts to classify out of a file or a stream, and their answers into a file: csv or jsonl by the name's ending."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.files import write_text
from fedprompt_mpi.report.inert import csv_cell
from fedprompt_mpi.rundir.closing_table import format_interval
from fedprompt_mpi.text.labels import class_indices
from fedprompt_mpi.text.read import FORMATS, MOST_TEXT, Layout, read_table
from fedprompt_mpi.text.tasks import Task, resolve

STREAM = "-"
ENDINGS = (".csv", ".jsonl")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """N texts to classify."""

    texts: Sequence[str]
    texts_b: Sequence[str] | None
    """Of a task of pairs."""
    labels: np.ndarray | None = None
    """`[N]` int64 classes, if they are known."""
    note: str = ""
    """What is to be said of them."""


def read_texts(name: str, config: RunConfig) -> Asked:
    """Read the texts of a file with the columns of a run's task, or lines.

    Args:
        name: a csv, tsv, jsonl, Parquet or Arrow file; a .txt file of lines; or - for lines from the standard input.
        config: of the run, which says how the columns are called.

    Raises:
        SettingsError: if the file cannot be read, has no such columns, or a text is empty.
    """
    task = resolve(config.task)
    if name == STREAM or name.lower().endswith(".txt") or not name.lower().endswith(FORMATS):
        return _lines(name, task, config.task.encoding)
    path, wanted = Path(name), [column for column in (task.text, task.text_b, task.label) if column is not None]
    if not path.is_file():
        raise SettingsError(f"--file is {name!r}, but there is no such file")
    table = read_table(path, Layout(wanted=wanted, columns=config.task.columns, encoding=config.task.encoding))
    for column in (task.text, task.text_b):
        if column is not None and column not in table.columns:
            raise SettingsError(f"{name} has no column {column!r}, but {', '.join(table.names)[:300]}")
    labels, note = None, ""
    if task.label in table.columns and any(value is not None for value in table.columns[task.label]):
        try:
            labels = class_indices(table, dataclasses.replace(task, data=name), "given")
        except SettingsError:  # hidden, as in a test set, or other ones
            note = f"{name} has labels that are not the task's: no accuracy is computed"
    return Asked(
        texts=_texts(table.columns[task.text], name),
        texts_b=None if task.text_b is None else _texts(table.columns[task.text_b], name),
        labels=labels,
        note=note,
    )


def _lines(name: str, task: Task, encoding: str) -> Asked:
    if task.text_b is not None:
        raise SettingsError(f"--file is {name!r}, which has lines, and task {task.name} asks about pairs: give a table")
    try:
        known = "utf-8-sig" if encoding == "utf-8" else encoding
        text = sys.stdin.read() if name == STREAM else Path(name).read_text(encoding=known)
    except (OSError, UnicodeError, LookupError) as error:
        raise SettingsError(f"--file is {name!r}, which cannot be read ({error})") from error
    lines = text.removesuffix("\n").split("\n")  # splitlines would end one at a form feed too
    return Asked(texts=_texts([line.removesuffix("\r") for line in lines], name), texts_b=None)


def _texts(values: Sequence[Any], name: str) -> list[str]:
    texts = ["" if value is None else str(value) for value in values]
    for row, text in enumerate(texts, 1):
        if not text.strip():
            raise SettingsError(f"row {row} of {name} has no text: leave it out")
        if len(text) > MOST_TEXT:
            raise SettingsError(f"row {row} of {name} has {len(text):,} characters, more than {MOST_TEXT:,}")
    return texts


def check_ending(name: str) -> None:
    """Raise SettingsError unless answers can be written to a file of this name."""
    if not name.endswith(ENDINGS):
        raise SettingsError(f"--out is {name!r}: its name must end with {' or '.join(ENDINGS)}")


def write_answers(name: str, answers: Sequence[Any], classes: Sequence[str]) -> None:
    """Write class, label and probabilities of each text, in their order.

    Args:
        name: of the file; an existing one is replaced.
        answers: of `Prompt.predict`.
        classes: their names.
    """
    if name.endswith(".jsonl"):
        rows = (
            {"class": a.label, "label": a.name, "probabilities": dict(zip(classes, a.probabilities, strict=True))}
            for a in answers
        )
        write_text(Path(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "label", *(csv_cell(f"probability of {one}") for one in classes)])
    writer.writerows([a.label, csv_cell(a.name), *(f"{p:.6f}" for p in a.probabilities)] for a in answers)
    write_text(Path(name), text.getvalue())


def accuracy_line(answers: Sequence[Any], labels: np.ndarray) -> str:
    """Return accuracy with its 95 % interval, and what the most frequent class would get."""
    right = float(np.mean([answer.label for answer in answers] == labels))
    most = float(np.bincount(labels).max() / len(labels))
    return (
        f"accuracy {right:.2%} of {len(labels):,} texts ({format_interval(right, len(labels))}); always "
        f"answering the most frequent class gives {most:.2%}"
    )

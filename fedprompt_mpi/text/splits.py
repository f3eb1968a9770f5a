"""Find the training and the evaluation split of what a user names: a folder, a file, or a data set of the hub.

A folder may hold a file for each split, shards of them (also in its `data`, as a clone of a hub data set has), or what
`save_to_disk` of the library datasets writes. A single file is split by the seed.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.hub import is_hub_id, why_not_had
from fedprompt_mpi.text.read import FORMATS, Layout, Table, check_type, read_table, values_of
from fedprompt_mpi.text.tasks import Task

NAMES = {"train": ("train", "training"), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
"""Split -> what it may be called."""
MOST_LISTED = 8
"""Names of files in a message."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The tables of a data set."""

    train: Table
    held_out: Table | None
    """None if there is one table for both."""
    name: str
    """Of the held-out split."""


def read_splits(task: Task, config: TaskConfig) -> Splits:
    """Read the training split and the one for evaluation.

    Raises:
        SettingsError: if they are not there, or cannot be read.
    """
    data = str(task.data)
    wanted = [column for column in (task.text, task.text_b, task.label, task.user) if column is not None]
    layout = Layout(wanted=wanted, columns=config.columns, encoding=config.encoding)
    place = Path(data)
    if place.is_dir():
        return _read_folder(place, layout, config.eval_split)
    if place.is_file():
        return _read_alone([place], layout, config.eval_split)
    if not is_hub_id(data.partition(":")[0]) or data.count(":") > 1:
        raise SettingsError(f"task.data is {data!r}, but there is no such folder or file")
    return _read_hub(data, config.eval_split, wanted)


def _read_folder(folder: Path, layout: Layout, eval_split: str) -> Splits:
    found = {split: _files_of(folder, split) for split in NAMES}
    if not any(found.values()):
        alone = _only_table(folder, layout)
        if alone:
            return _read_alone(alone, layout, eval_split)
    choices = ("test", "dev") if eval_split == "auto" else (eval_split,)
    held_out = next((split for split in choices if found[split]), None)
    if found["train"] and held_out is None and eval_split == "auto":
        return _read_alone(found["train"], layout, eval_split)
    if not found["train"] or held_out is None:
        there = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
        listed = ", ".join(there[:MOST_LISTED]) + (
            f" and {len(there) - MOST_LISTED} more" if there[MOST_LISTED:] else ""
        )
        raise SettingsError(
            f"task.data is {str(folder)!r}, which needs a train file and a {' or '.join(choices)} file (such as "
            f"train.csv, test.jsonl, validation.parquet), or one file for both, but has {listed or 'nothing'}"
        )
    return Splits(train=_read_all(found["train"], layout), held_out=_read_all(found[held_out], layout), name=held_out)


def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, in their order; [] if there are none.

    Raises:
        SettingsError: if shards are missing.
    """
    for place in (folder, folder / "data"):
        names = sorted(path.name for path in place.iterdir() if path.is_file()) if place.is_dir() else []
        for called in NAMES[split]:
            for suffix in FORMATS:
                if called + suffix in names:
                    return [place / (called + suffix)]
                shard = re.compile(rf"{called}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
                matches = [match for name in names if (match := shard.fullmatch(name))]
                if matches:
                    return _all_shards(place, matches)
            saved = _saved(place / called)
            if saved:
                return saved
    return []


def _all_shards(place: Path, matches: Sequence[re.Match[str]]) -> list[Path]:
    count = int(matches[0][2])
    if [int(match[1]) for match in matches] != list(range(count)):
        raise SettingsError(f"task.data has {len(matches)} of the {count} shards of {matches[0][0]!r}: get all of them")
    return [place / match[0] for match in matches]


def _saved(folder: Path) -> list[Path]:
    """Return the files that `save_to_disk` has written for a table, in their order."""
    return sorted(folder.glob("data-*.arrow")) if (folder / "state.json").is_file() else []


def _only_table(folder: Path, layout: Layout) -> list[Path]:
    """Return the one table in a folder; [] if there is none, or there are several files."""
    saved = _saved(folder)
    if saved:
        return saved
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "README"))]
    tables = [path for path in files if path.name.lower().endswith(FORMATS)] or (files if layout.columns else [])
    return tables if len(tables) == 1 else []


def _read_alone(files: Sequence[Path], layout: Layout, eval_split: str) -> Splits:
    if eval_split != "auto":
        raise SettingsError(
            f"task.eval_split is {eval_split}, but task.data has no such split: leave it out, and a part of the "
            "training data is kept for evaluation"
        )
    return Splits(train=_read_all(files, layout), held_out=None, name="held-out")


def _read_all(files: Sequence[Path], layout: Layout) -> Table:
    """Read the shards of a split as one table.

    Raises:
        SettingsError: if one of them cannot be read, or has other columns than the first.
    """
    tables = [read_table(file, layout) for file in files]
    first = tables[0]
    for file, table in zip(files, tables, strict=True):
        if table.names != first.names:
            raise SettingsError(f"{file} has the columns {table.names[:20]}, and {files[0].name} {first.names[:20]}")
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(names=first.names, columns=columns, class_names=first.class_names)


def _read_hub(name: str, eval_split: str, wanted: Sequence[str]) -> Splits:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path, _, subset = name.partition(":")
    failed = f"task.data is {name!r}: no such folder or file, and it cannot be had as a hub data set"
    reason = why_not_had("dataset", path)
    if reason:  # a copy on this disk may serve
        datasets.config.HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        splits = datasets.load_dataset(path, subset or None)
    except Exception as error:  # network, spelling, permission: all end here
        raise SettingsError(f"{failed} ({reason or str(error).strip().splitlines()[0]})") from error
    choices = ("test", "dev") if eval_split == "auto" else (eval_split,)
    called = [called for split in choices for called in NAMES[split]]
    held_out = next((split for split in called if split in splits), None)
    train = next((split for split in NAMES["train"] if split in splits), None)
    if train is None:
        raise SettingsError(f"task.data {name!r} has the splits {list(splits)}, but no train")
    if held_out is None and eval_split != "auto":
        raise SettingsError(f"task.data {name!r} has the splits {list(splits)}: one of {', '.join(called)} needed")
    return Splits(
        train=_from_hub(name, splits[train], wanted),
        held_out=None if held_out is None else _from_hub(name, splits[held_out], wanted),
        name=held_out or "held-out",
    )


def _from_hub(name: str, split: Any, wanted: Sequence[str]) -> Table:
    """Take columns out of a split of a hub data set, from the Arrow table below it: nothing is decoded."""
    table = split.data.table
    columns, names = {}, {}
    for column in (column for column in wanted if column in table.column_names):
        try:
            check_type(column, table.schema.field(column).type)
        except ValueError as error:
            raise SettingsError(f"task.data is {name!r}, whose {error}") from error
        columns[column] = [value for chunk in table.column(column).chunks for value in values_of(chunk)]
        own = getattr(split.features.get(column), "names", None)
        if own is not None:
            names[column] = list(own)
    return Table(names=list(table.column_names), columns=columns, class_names=names)

"""Read the columns of a data file: separated by commas, tabs or semicolons, JSON lines, Parquet or Arrow.

The file may come from somebody else. Only text, whole numbers and booleans are taken out of it, and nothing is decoded:
no image, no audio, no path, no address. What it expands to in memory has a limit, that goes with its size.
"""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import open_regular

COMPRESSED = (".gz", ".zst")
_TEXT_FORMATS = (".csv", ".tsv", ".txt", ".jsonl", ".json")
FORMATS = (*(kind + how for kind in _TEXT_FORMATS for how in ("", *COMPRESSED)), ".parquet", ".arrow")
SEPARATORS = (",", "\t", ";")
MOST_TEXT = 2**20
"""Longest text, in characters."""
MOST_LINE = 2**22
"""Longest line of a text file, in characters."""
MOST_EXPANSION, FREE_BYTES = 100, 2**26
"""A file may take so many times its size in memory, and that much in any case; texts in gzip or Parquet take 10."""
MOST_GZIP_HEAD = 2**16
"""Bytes in which the names in a gzip header must end."""
ROW_BYTES = 64
"""What a row takes beside its texts."""
PARQUET_ROWS = 256
"""Rows that are read at a time."""
_SURROGATE = re.compile("[\ud800-\udfff]")
Value = str | int | float | bool | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The columns of a file that were asked for; all have the same length."""

    names: list[str]
    """Of all columns that the file has."""
    columns: dict[str, list[Value]]
    """Name -> values; a name that was asked for and is not there is missing."""
    class_names: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Columns of whole numbers that stand for names (`ClassLabel` of the library datasets) -> these."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


class Room:
    """What a file may still expand to, in bytes of memory."""

    def __init__(self, size: int) -> None:
        """Start with the room for a file of some bytes."""
        self.left = max(FREE_BYTES, MOST_EXPANSION * size)
        self._most = self.left

    def take(self, size: int) -> None:
        """Take some bytes.

        Raises:
            ValueError: if they are not left.
        """
        self.require(size)
        self.left -= size

    def require(self, size: int) -> None:
        """Raise ValueError if some bytes are not left."""
        if size > self.left:
            raise ValueError(f"it expands to more than {self._most:,} bytes, over {MOST_EXPANSION} times its size")

    def take_row(self, row: int, values: Sequence[Value]) -> None:
        """Take the room of a row; raises as `take` does, also if a text of it is too long."""
        lengths = [len(value) for value in values if isinstance(value, str)]
        if max(lengths, default=0) > MOST_TEXT:
            raise ValueError(f"row {row} has a text of {max(lengths):,} characters, more than {MOST_TEXT:,}")
        self.take(ROW_BYTES + sum(lengths))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a file does not say of itself."""

    wanted: Sequence[str]
    """Names of the columns to read."""
    columns: Sequence[str] | None = None
    """Names of all columns of a file without a header."""
    encoding: str = "utf-8"


def read_table(path: Path, layout: Layout) -> Table:
    """Read some columns of a file.

    Args:
        path: its name ends like one of `FORMATS`, or it is a separated file; a path means itself, it is no pattern.
        layout: which columns, and what the file does not say.

    Raises:
        SettingsError: if it cannot be read, is too large, or a column holds anything else than text and numbers.
    """
    try:
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 - a handle
            room = Room(os.fstat(file.fileno()).st_size)
            name = path.name.lower()
            if name.endswith(".parquet"):
                return _read_parquet(file, layout.wanted, room)
            if name.endswith(".arrow"):
                return _read_arrow(file, layout.wanted, room)
            lines = _lines(_expanded(name, file), room, layout.encoding)
            is_json = name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json"))
            return _collect(_read_jsonl(lines) if is_json else _read_separated(lines, layout), layout.wanted, room)
    except UnicodeError as error:
        raise SettingsError(
            f"{path} cannot be read: it is no {layout.encoding} ({getattr(error, 'reason', error)}): "
            f"give its encoding, such as --task.encoding {_likely_encoding(path)}"
        ) from error
    except (OSError, ValueError, LookupError, csv.Error, zlib.error, EOFError, RecursionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SettingsError(f"{path} cannot be read: {reason[0]}") from error


def _likely_encoding(path: Path) -> str:
    with open(open_regular(path), "rb") as file:  # noqa: PTH123
        head = file.read(2)
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"


def _expanded(name: str, file: IO[bytes]) -> Any:
    """Return the bytes of a file, expanded if its name says that they are compressed."""
    if name.endswith(".zst"):
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd")
    if not name.endswith(".gz"):
        return file
    head, _ = file.read(MOST_GZIP_HEAD), file.seek(0)
    if head[3:4] > b"\x07" and b"\0" not in head[10:]:
        raise ValueError("its gzip header has a name without end")  # which is read byte by byte
    return gzip.GzipFile(fileobj=file)


def _collect(rows: Iterator[dict[str, Any]], wanted: Sequence[str], room: Room) -> Table:
    names: dict[str, None] = {}
    columns: dict[str, list[Value]] = {name: [] for name in wanted}
    for number, row in enumerate(rows, 1):
        names |= dict.fromkeys(row)
        values = [row.get(name) for name in wanted]
        for name, value in zip(wanted, values, strict=True):
            if isinstance(value, str) and _SURROGATE.search(value):
                raise ValueError(f"row {number} has half of a surrogate pair in column {name!r}: that is no text")
            if not isinstance(value, Value):
                raise ValueError(f"row {number} has {_kind(value)} in column {name!r}: only text and numbers are read")
            columns[name].append(value)
        room.take_row(number, values)
    if not names:
        raise ValueError("it has no examples")
    return Table(names=list(names), columns={name: columns[name] for name in wanted if name in names})


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "a table"


class _Limited(io.RawIOBase):
    """The bytes of a stream, as far as there is room for them."""

    def __init__(self, stream: Any, room: Room) -> None:
        self._stream, self._left = stream, room.left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._stream.readinto(buffer)
        self._left -= read
        if self._left < 0:
            raise ValueError(f"it expands to over {MOST_EXPANSION} times its size")
        return read


def _lines(stream: Any, room: Room, encoding: str) -> Iterator[str]:
    """Yield the lines of a text file, each up to a limit: a line becomes objects that take many times its bytes."""
    if encoding.lower() in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    text = io.TextIOWrapper(io.BufferedReader(_Limited(stream, room)), encoding=encoding, newline="")
    while line := text.readline(MOST_LINE + 1):
        if len(line) > MOST_LINE:
            raise ValueError(f"it has a line of more than {MOST_LINE:,} characters")
        if "\0" in line:
            raise ValueError("it holds NUL bytes: it is no text file")
        yield line


def _read_separated(lines: Iterator[str], layout: Layout) -> Iterator[dict[str, Any]]:
    first = next(lines, "")
    separator = _separator(first, layout)
    lines = itertools.chain([first] if first else [], lines)
    with _long_fields():
        rows = _tab_rows(lines) if separator == "\t" else _rows(lines, separator)
        head = list(layout.columns) if layout.columns else next(rows, [])
        if not head:
            raise ValueError("it is empty")
        _check_names(head)
        for number, row in enumerate((row for row in rows if row), 1):
            if len(row) != len(head):
                raise ValueError(
                    f"row {number} has {len(row)} fields, and {'task.columns' if layout.columns else 'the header'} "
                    f"{len(head)}"
                )
            if number == 1 and layout.columns and row == head:
                raise ValueError("its first line is a header, which has the names of task.columns: leave those out")
            yield dict(zip(head, row, strict=True))


def _separator(line: str, layout: Layout) -> str:
    """Return what separates the fields of a file: what makes the expected columns of its first line, or most fields."""

    def fit(separator: str) -> tuple[bool, int]:
        try:
            fields = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:  # a line end in quotes
            fields = line.split(separator)
        if layout.columns:
            return len(fields) == len(layout.columns), len(fields)
        return len({*layout.wanted} & {*fields}) > 0, len({*layout.wanted} & {*fields}) * MOST_LINE + len(fields)

    return max(SEPARATORS, key=fit)


def _tab_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yield the rows of a file with tabs, in which quotes are letters, but for a field that is quoted as in CSV."""
    for line in lines:
        text = line.rstrip("\r\n")
        yield [_unquoted(field) for field in text.split("\t")] if text else []


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"it has two columns of the same name: {', '.join(names)[:200]}")


def _rows(lines: Iterator[str], separator: str) -> Iterator[list[str]]:
    """Yield the rows of a CSV file, each up to the limit of a line: fields take many times the bytes of their texts."""
    length = 0

    def counted() -> Iterator[str]:
        nonlocal length
        for line in lines:
            length += len(line)
            if length > MOST_LINE:
                raise ValueError(f"it has a row of more than {MOST_LINE:,} characters")
            yield line

    for row in csv.reader(counted(), strict=True, delimiter=separator):
        length = 0
        yield row


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(MOST_TEXT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_jsonl(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no table of column names and values")
        yield row


def _read_parquet(file: IO[bytes], wanted: Sequence[str], room: Room) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file, memory_map=False)
        _check_names(schema.names)
        there = [name for name in wanted if name in schema.names]
        for name in there:
            check_type(name, schema.field(name).type)
        opened = parquet.ParquetFile(file, memory_map=False, read_dictionary=there)
        metadata = opened.metadata
        room.take(ROW_BYTES * metadata.num_rows)
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        room.require(sum(group.total_byte_size for group in groups))
        columns: dict[str, list[Value]] = {name: [] for name in there}
        row = 0
        for batch in opened.iter_batches(batch_size=PARQUET_ROWS, columns=there, use_threads=False):
            for name in there:
                columns[name] += values_of(batch.column(name))
            for row in range(row + 1, row + 1 + batch.num_rows):  # noqa: B020 - it goes on from batch to batch
                room.take_row(row, [columns[name][row - 1] for name in there])
        return Table(names=list(schema.names), columns=columns, class_names=_class_names(schema.metadata))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _read_arrow(file: IO[bytes], wanted: Sequence[str], room: Room) -> Table:
    """Read a stream of record batches, as `save_to_disk` of the library datasets writes it."""
    import pyarrow

    try:
        content = pyarrow.BufferReader(file.read())  # out of which no size that a file claims can lead
        with pyarrow.ipc.open_stream(content) as batches:
            schema = batches.schema
            _check_names(schema.names)
            columns: dict[str, list[Value]] = {name: [] for name in wanted if name in schema.names}
            for name in columns:
                check_type(name, schema.field(name).type)
            rows = 0
            for batch in batches:
                batch.validate(full=True)  # what is not valid may lead out of its memory
                room.require(batch.nbytes)
                own = {name: values_of(batch.column(name)) for name in columns}
                for row in range(batch.num_rows):
                    room.take_row(rows + row + 1, [values[row] for values in own.values()])
                rows += batch.num_rows
                for name, values in own.items():
                    columns[name] += values
        return Table(names=list(schema.names), columns=columns, class_names=_class_names(schema.metadata))
    except MemoryError as error:  # of a batch whose size is a lie
        raise ValueError("it asks for more memory than there is") from error
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of classes that the library datasets keeps in a schema, by column."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            column: feature["names"] for column, feature in features.items() if feature.get("_type") == "ClassLabel"
        }
        return {column: names for column, names in found.items() if all(isinstance(name, str) for name in names)}
    return {}


def check_type(name: str, kind: Any) -> None:
    """Raise ValueError if a column's Arrow type is neither text nor a number nor a boolean."""
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
    if not (is_text or types.is_integer(plain) or types.is_boolean(plain) or types.is_floating(plain)):
        raise ValueError(f"column {name!r} is of type {str(kind)[:60]}: only text and numbers are read")


def values_of(column: Any) -> list[Value]:
    """Return the values of an Arrow array; equal texts of a dictionary are one object."""
    from pyarrow import types

    if not types.is_dictionary(column.type):
        return column.to_pylist()
    words = column.dictionary.to_pylist()
    return [None if k is None else words[k] for k in column.indices.to_pylist()]

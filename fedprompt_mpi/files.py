"""Bounded reads, and writes that leave a whole file or none.

A file gets its name only when all of it is on the disk: temporary file, fsync, rename. A file that is read may come
from somebody else: it is TOML, JSON, CSV or safetensors, and its size is limited.
"""

import contextlib
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedprompt_mpi.config import SettingsError

MOST_TEXT_BYTES = 2**20
"""Largest file of settings."""
MOST_JSON_BYTES = 2**26
"""Largest JSON file: a federation of 100,000 clients has a partition of 16 MB."""
MOST_LINES_BYTES = 2**30
"""Largest file that grows with each round."""
MOST_HEADER_BYTES = 2**24
"""Largest header of a safetensors file."""
MOST_TENSOR_BYTES = 2**36
"""Largest content of a safetensors file: a model of 16 billion parameters, fully fine-tuned."""


class CannotWriteError(Exception):
    """A file of the run cannot be written: the disk is full or gone, or a quota is used up."""

    remedy = "Make room; --output.resume true continues with the last checkpoint."


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file in the message of any failure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CannotWriteError(f"{path} ({reason})") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` once all of it is on the disk."""
    with _writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink()
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with _whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all, as UTF-8."""
    write_bytes(path, content.encode())


def append_text(path: Path, lines: str) -> None:
    """Append lines to a file; they are on the disk when this returns. A crash may leave a last line without end."""
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a text file.

    Raises:
        OSError: if there is none.
        ValueError: if it is larger than so many bytes, or no UTF-8.
    """
    return "".join(bounded_lines(path, most_bytes))


def bounded_lines(path: Path, most_bytes: int) -> Iterator[str]:
    """Yield the lines of a text file, with their ends; raises as `read_text` does."""
    read = 0
    with path.open("rb") as file:
        while line := file.readline(most_bytes + 1 - read):
            read += len(line)
            if read > most_bytes:
                raise ValueError(f"it is larger than {most_bytes:,} bytes")
            yield line.decode()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of settings; raises as `read_text` does, and ValueError if it is no TOML."""
    return _parsed(tomllib.loads, path, MOST_TEXT_BYTES)


def read_json(path: Path) -> Any:
    """Read a JSON file; raises as `read_text` does, and ValueError if it is no JSON."""
    return _parsed(json.loads, path, MOST_JSON_BYTES)


def _parsed(parse: Callable[[str], Any], path: Path, most_bytes: int) -> Any:
    try:
        return parse(read_text(path, most_bytes))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    with _whole(path) as temporary:  # straight from the arrays: there may be no memory for a copy
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, dict(metadata))


def read_tensors(file: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Args:
        file: its path.
        what: what the file should be, for the message.

    Raises:
        SettingsError: if there is no such file, or it cannot be read.
    """
    try:
        _check_size(file)
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return tensors, dict(opened.metadata() or {})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise SettingsError(f"{file} cannot be read as {what} ({error})") from error


def _check_size(file: Path) -> None:
    """Raise ValueError if a safetensors file is, or claims to be, larger than anything that this program writes."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    size = file.stat().st_size - 8
    if header > min(size, MOST_HEADER_BYTES) or size - header > MOST_TENSOR_BYTES:
        raise ValueError(f"it has {size:,} bytes, and claims {header:,} of them for its header")

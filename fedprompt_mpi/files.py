"""Files that are written whole or not at all, files that grow by whole lines, and the prompt file.

A file appears under its name only when all of it is on the disk: temporary file, fsync, rename.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedprompt_mpi.config import SettingsError

PROMPT_FILE = "prompt.safetensors"


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes its place once all of it is on the disk."""
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
    """Add lines to a file; they are on the disk when this returns. What a crash leaves is a last line without end."""
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_prompt(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a prompt: `vector` `[P]`, the parameters by name, the effective prompt, and what they are of."""
    with _whole(path) as temporary:  # straight from the arrays: a copy could be too much
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, dict(metadata))


def read_prompt(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a run's prompt.

    Args:
        path: a run directory or its prompt.safetensors.

    Raises:
        SettingsError: if there is no such file, or it is no prompt.
    """
    file = Path(path) / PROMPT_FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"{file} cannot be read as a prompt ({error}): name a run directory or its {PROMPT_FILE}"
        ) from error
    if "vector" not in tensors or tensors["vector"].ndim != 1:
        raise SettingsError(f"{file} is no prompt: it has no vector")
    return tensors, metadata

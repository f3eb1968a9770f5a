"""Bounded reads that follow no link of somebody else, and writes that leave a whole file or none.

A file gets its name only when all of it is on the disk: temporary file, fsync, rename. A file that is read may come
from somebody else: it is TOML, JSON, CSV or safetensors, it is a regular file, and no more of it is read than a limit.

A file is named in one of two ways. A `Path` is what the user typed: links on the way to it are followed. A `RunFile`
lies in a folder that may have been received from somebody else: below that folder no link is followed.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedprompt_mpi.config import SettingsError

CONTINUE = "--output.resume true continues with the last checkpoint."
"""What is left to do after most failures."""
NO_MEMORY = ("failed to map segment", "can't allocate memory", "could not create a primitive")
"""What the dynamic linker, torch and oneDNN say of it."""
MOST_TEXT_BYTES = 2**20
"""Largest file of settings."""
MOST_KEY_PARTS = 8
"""Parts of a dotted TOML key; the time that the parser takes grows with their square."""
MOST_JSON_BYTES = 2**26
"""Largest JSON file: a federation of 100,000 clients has a partition of 16 MB."""
MOST_JSON_PARTS = 10**6
"""Lists and tables of a JSON file, each of which takes many times its two bytes."""
MOST_LINES_BYTES = 2**30
"""Largest file that grows with each round."""
MOST_HEADER_BYTES = 2**24
"""Largest header of a safetensors file."""
MOST_TENSOR_BYTES = 2**36
"""Largest content of a safetensors file: a model of 16 billion parameters, fully fine-tuned."""
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{MOST_KEY_PARTS}}}")
_ROOM = "Make room"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Allow this user to write there"),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTDIR), "Bring the folder or its disk back"),
    **dict.fromkeys((errno.ELOOP, errno.EEXIST, errno.EISDIR), "Remove what is there in its place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n)"),
    errno.EFBIG: "Allow larger files (ulimit -f)",
}


class CannotWriteError(Exception):
    """A file of the run cannot be written; the message names the file and the reason, `remedy` what to do."""

    def __init__(self, file: object, error: Exception, *, remedy: str = "") -> None:
        """Describe an error, an OSError or one of safetensors, that writing a file has raised.

        Args:
            file: which one, or its folder.
            error: what was raised.
            remedy: by default what fits the error.
        """
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        super().__init__(f"{file} ({reason})")
        number = error.errno if isinstance(error, OSError) else None
        if number is None and "os error" in str(error).lower():
            number = next((int(found) for found in re.findall(r"os error (\d+)", str(error))), None)
        do = _REMEDIES.get(number or 0, "Make the file writable")
        self.remedy = remedy or f"{do}; {CONTINUE}"


class ChangedFileError(Exception):
    """A file that a run has mapped was changed, moved or removed; the message names it."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class RunFile:
    """A file below a folder that may come from somebody else."""

    folder: Path
    """It may be reached through links: the user named it."""
    name: str
    """Below the folder, at most one level deep; no part of it may be a link."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The path, for messages; opened by it, links would be followed."""
        return self.folder / self.name

    def exists(self) -> bool:
        """Return True if there is something with this name, be it only a link."""
        try:
            with parent_of(self) as (folder, name):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        return True

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the file; of a link the link itself.

        Raises:
            CannotWriteError: if it cannot be removed.
        """
        try:
            with parent_of(self) as (folder, name):
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError as error:
            if not missing_ok:
                raise CannotWriteError(self, error) from error
        except OSError as error:
            raise CannotWriteError(self, error) from error


File = Path | RunFile
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def parent_of(file: File, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """Yield a handle of the folder that a file is in, and the file's name in it.

    Args:
        file: below the folder of a `RunFile` no link is followed.
        make: make the folder below that of a `RunFile` if it is not there.

    Raises:
        OSError: if there is no such folder.
    """
    if isinstance(file, Path):
        folder, parts = file.parent, [file.name]
    else:
        folder, parts = file.folder, file.name.split("/")
    handle = os.open(folder, _FOLDER)
    try:
        for part in parts[:-1]:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        yield handle, parts[-1]
    finally:
        os.close(handle)


def stats_in(folder: Path, below: str = "") -> dict[str, os.stat_result]:
    """Return name -> state of all there is in a folder, or in one below it; {} if that is no folder."""
    try:
        with parent_of(RunFile(folder, f"{below}/." if below else ".")) as (handle, _):
            names = os.listdir(handle)  # noqa: PTH208 - a handle
            return {name: os.stat(name, dir_fd=handle, follow_symlinks=False) for name in sorted(names)}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return {}
        raise


def open_regular(file: File) -> int:
    """Open a regular file to read it; returns the handle.

    Raises:
        OSError: if there is none, or a `RunFile` is a link.
        ValueError: if it is no regular file: a pipe or a device may never end.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe without a writer would be waited for
    if isinstance(file, Path):
        handle = os.open(file, flags)
    else:
        with parent_of(file) as (folder, name):
            handle = os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file")
    return handle


@contextlib.contextmanager
def _writing(file: File) -> Iterator[None]:
    """Name the file in the message of any failure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotWriteError(file, error) from error


@contextlib.contextmanager
def _whole(file: File) -> Iterator[tuple[int, str]]:
    """Yield a folder's handle and the name of an empty file in it, which replaces `file` once all of it is on the disk.

    Its mode is that of the umask, also if the block puts another file in its place.
    """
    with _writing(file), parent_of(file, make=True) as (folder, name):
        temporary = f".{name}.{secrets.token_hex(4)}"
        handle = os.open(temporary, _NEW | os.O_EXCL, 0o666, dir_fd=folder)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield folder, temporary
            handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                os.fchmod(handle, mode)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise


def write_bytes(file: File, content: bytes) -> None:
    """Write a file whole or not at all."""
    _write_parts(file, [content])


def write_text(file: File, content: str) -> None:
    """Write a text file whole or not at all, as UTF-8."""
    write_lines(file, [content])


def write_lines(file: File, lines: Iterable[str]) -> None:
    """Write a text file whole or not at all, as UTF-8, line after line: it may be larger than memory."""
    _write_parts(file, (line.encode("utf-8", errors="backslashreplace") for line in lines))


def _write_parts(file: File, parts: Iterable[bytes]) -> None:
    with (
        _whole(file) as (folder, name),
        open(os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=folder), "wb") as opened,  # noqa: PTH123 - a handle
    ):
        opened.writelines(parts)


def open_to_append(file: File) -> IO[bytes]:
    """Open a file to append to it, and make it if there is none.

    Raises:
        OSError: if it is a link, or cannot be opened; a pipe that nobody reads cannot.
    """
    with parent_of(file) as (folder, name):
        return open(os.open(name, _NEW | os.O_APPEND | os.O_NONBLOCK, 0o666, dir_fd=folder), "ab")  # noqa: PTH123


def append_text(file: File, lines: str) -> None:
    """Append lines to a file; they are on the disk when this returns. A crash may leave a last line without end."""
    with _writing(file), open_to_append(file) as opened:
        opened.write(lines.encode("utf-8", errors="backslashreplace"))
        opened.flush()
        os.fsync(opened.fileno())


def read_text(file: File, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a text file.

    Raises:
        OSError: if there is none.
        ValueError: if it is no regular file, larger than so many bytes, or no UTF-8.
    """
    return "".join(bounded_lines(file, most_bytes))


def bounded_lines(file: File, most_bytes: int) -> Iterator[str]:
    """Yield the lines of a text file, with their ends; raises as `read_text` does."""
    read = 0
    with open(open_regular(file), "rb") as opened:
        while line := opened.readline(most_bytes + 1 - read):
            read += len(line)
            if read > most_bytes:
                raise ValueError(f"it is larger than {most_bytes:,} bytes")
            yield line.decode()


def read_toml(file: File) -> dict[str, Any]:
    """Read a file of settings; raises as `read_text` does, and ValueError if it is no TOML."""
    return _parsed(_parse_toml, file, MOST_TEXT_BYTES)


def _parse_toml(text: str) -> dict[str, Any]:
    if found := _LONG_KEY.search(text):
        raise ValueError(f"it has a name of more than {MOST_KEY_PARTS} parts: {found[0][:60]!r}")
    return tomllib.loads(text)


def read_json(file: File) -> Any:
    """Read a JSON file; raises as `read_text` does, and ValueError if it is no JSON."""
    return _parsed(parse_json, file, MOST_JSON_BYTES)


def parse_json(text: str) -> Any:
    """Return what a JSON text holds; raises ValueError if it is no JSON, or has too many lists and tables."""
    if text.count("[") + text.count("{") > MOST_JSON_PARTS:
        raise ValueError(f"it has more than {MOST_JSON_PARTS:,} lists and tables")
    return json.loads(text)


def _parsed(parse: Callable[[str], Any], file: File, most_bytes: int) -> Any:
    try:
        return parse(read_text(file, most_bytes))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(file: File, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(file: File, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    content = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with _whole(file) as (folder, name):  # straight from the arrays: there may be no memory for a copy
        save_file(content, _path_of(folder) / name, dict(metadata))


def read_tensors(file: File, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Args:
        file: where it is.
        what: what the file should be, for the message.

    Raises:
        SettingsError: if there is no such file, it cannot be read, or it needs more memory than there is.
    """
    try:
        handle = open_regular(file)
        try:
            _check_size(handle)
            with safe_open(_path_of(handle), framework="numpy") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
                return tensors, dict(opened.metadata() or {})
        finally:
            os.close(handle)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:  # of types numpy has not
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SettingsError(f"{file} cannot be read as {what} ({reason})") from error


def _path_of(handle: int) -> Path:
    """Return a path of an open file or folder, for a library that opens files itself."""
    return Path(f"/proc/self/fd/{handle}")


def _check_size(handle: int) -> None:
    """Raise ValueError if a safetensors file is, or claims to be, larger than this program writes or memory holds."""
    header = int.from_bytes(os.pread(handle, 8, 0), "little")
    size = os.fstat(handle).st_size - 8
    if header > min(size, MOST_HEADER_BYTES) or size - header > MOST_TENSOR_BYTES:
        raise ValueError(f"it has {size:,} bytes, and claims {header:,} of them for its header")
    if size > (free := free_memory()):
        raise ValueError(f"it has {size:,} bytes, and {free:,} bytes of memory are free")


def free_memory() -> int:
    """Return the memory, in bytes, that this process could still take; where that is unknown, 2^62."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return 2**62 if found is None else 1024 * int(found[1])

"""Save and resume, exactly.

The clients' optimiser states start anew each round and all chance comes from (seed, purpose, round, client), so the
global vector, what the server's rule and optimiser and the clients' error feedback remember, and the number of rounds
done are the whole state of a federation.

A checkpoint is a file, written whole or not at all, with a checksum over all that is in it. The last two are kept: if
one turns out to be damaged, the one before it is used.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comparable import RESULT, differences, dotted, with_rounds
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import read_prompt, read_toml, write_tensors
from fedprompt_mpi.lock import is_empty

FOLDER = "checkpoint"
KEPT = 2
MOST_NAMED = 6
"""So many differences between settings are shown."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A federation between two rounds."""

    vector: Any
    """`[P]` float32: an array, or on a worker that hands a GPU's memory to MPI room for it there."""
    round_: int
    """Rounds done."""
    record: dict[str, Any]
    """The last round's line, which is written once its vector has been evaluated."""
    state: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the server, an attacker and the clients' error feedback remember from round to round, by name; float32."""


def mathematics(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return of nested settings those that decide the result, by their dotted names."""
    return dotted(settings, with_rounds(RESULT, settings))


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run directory, the latest first."""
    return sorted((directory / FOLDER).glob("round-*.safetensors"), reverse=True)


def save_checkpoint(directory: Path, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Write what a resume needs, with a checksum and the settings it belongs to; then remove what is too old."""
    tensors = {**checkpoint.state, "vector": checkpoint.vector}
    metadata = {
        "round": str(checkpoint.round_),
        "record": json.dumps(checkpoint.record),
        "settings": json.dumps(mathematics(to_dict(config)), sort_keys=True),
    }
    file = directory / FOLDER / f"round-{checkpoint.round_:08d}.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_tensors(file, tensors, {**metadata, "sha256": _checksum(tensors, metadata)})
    for old in checkpoints(directory)[KEPT:]:
        old.unlink()


def load_checkpoint(directory: Path, config: RunConfig) -> tuple[Checkpoint | None, list[str]]:
    """Read the last good checkpoint of a run directory.

    Returns:
        The checkpoint, or None if there is no run yet or it has not come to its first; and what to warn of.

    Raises:
        SettingsError: if all are damaged, the run has other settings, or what is there is no run.
    """
    damaged = []
    for file in checkpoints(directory):
        try:
            checkpoint, settings = _read(file)
        except (SettingsError, _Damaged) as error:
            damaged.append(f"{file} is damaged ({error})")
            continue
        _check_settings(directory, settings, config)
        return checkpoint, [f"{words}: the one before it is used" for words in damaged]
    if damaged:
        raise SettingsError(f"output.resume: {'; '.join(damaged)}: start anew in another output.dir")
    if directory.is_dir() and not is_empty(directory):
        try:
            theirs = mathematics(read_toml(directory / "config.toml"))
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise SettingsError(f"output.resume: {directory} is not empty, and no run of this program") from error
        _check_settings(directory, theirs, config)
    return None, []


class Memory:
    """What rank 0 goes back to when another rank is lost: the last round that was done.

    If that is saved it is read again; if not, it is kept here. With short wire formats, part of what a round leaves is
    on the other ranks until it is saved: then it is the last round that was saved.
    """

    def __init__(self, config: RunConfig, directory: Path, beginning: Checkpoint) -> None:
        """Start from a checkpoint, or from the first vector, of which it takes copies."""
        self._config, self._directory = config, directory
        self.remember(beginning)

    def remember(self, checkpoint: Checkpoint) -> None:
        """Keep copies."""
        state = {name: array.copy() for name, array in checkpoint.state.items()}
        self._kept = dataclasses.replace(
            checkpoint, vector=checkpoint.vector.copy(), record=copy.deepcopy(checkpoint.record), state=state
        )

    def latest(self) -> Checkpoint:
        """Return the last round that was done; what it holds may be changed."""
        saved = load_checkpoint(self._directory, self._config)[0] if checkpoints(self._directory) else None
        if saved is not None and saved.round_ >= self._kept.round_:
            return saved
        kept = self._kept
        self.remember(kept)
        return kept


class _Damaged(Exception):  # noqa: N818 - what it says of a file
    """A file is not what was written."""


def _read(file: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint and the settings it was made with.

    Raises:
        SettingsError: if it is no file of tensors.
        _Damaged: if its content is not what was written.
    """
    tensors, metadata = read_prompt(file)
    if _checksum(tensors, metadata) != metadata.pop("sha256", None):
        raise _Damaged("its checksum differs")
    if metadata.keys() != {"round", "record", "settings"}:
        raise _Damaged("it is no checkpoint")
    record, settings = json.loads(metadata["record"]), json.loads(metadata["settings"])
    vector = tensors.pop("vector")
    return Checkpoint(vector=vector, round_=int(metadata["round"]), record=record, state=tensors), settings


def _check_settings(directory: Path, theirs: Mapping[str, Any], config: RunConfig) -> None:
    """Raise SettingsError, naming what differs, if a run was made with settings that give another result."""
    differs = [
        f"{name} = {json.dumps(there)} (now {json.dumps(here)})"
        for name, (there, here) in differences(theirs, mathematics(to_dict(config))).items()
    ]
    if differs:
        more = f" and {len(differs) - MOST_NAMED} more" if len(differs) > MOST_NAMED else ""
        raise SettingsError(
            f"output.resume: {directory} was made with {', '.join(differs[:MOST_NAMED])}{more}: "
            "use the settings of its config.toml"
        )


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, shapes, types and contents."""
    digest = hashlib.sha256()
    described = {name: [str(tensor.dtype), tensor.shape] for name, tensor in tensors.items()}
    others = {name: text for name, text in metadata.items() if name != "sha256"}
    digest.update(json.dumps([described, others], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()

"""Checkpoints, from which a run continues with the same bits.

The clients' optimiser states start anew each round, and all random numbers come from (seed, purpose, round, client). So
the whole state of a federation is the global vector, the state of the aggregator, of the server's optimiser and of the
clients' error feedback, and the number of rounds done.

A checkpoint is one file with a checksum over its content. The last two are kept: if one is damaged, the one before it
is used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import RunFile, write_tensors
from fedprompt_mpi.rules.setting import Comparison, typed
from fedprompt_mpi.rundir.may_differ import compared, differences
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import read_vector_file
from fedprompt_mpi.rundir.records import RoundRecord, read_round, read_settings

KEPT = 2
MOST_NAMED = 6
"""Number of differences between settings that a message shows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a federation between two rounds."""

    vector: Vector
    """`[P]` float32: on workers a buffer to receive in."""
    round_: int
    """Rounds done."""
    record: RoundRecord
    """The record of the last round, which is written once its vector has been evaluated."""
    state: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """State of the server, of an attacker and of the clients' error feedback, by name; float32."""
    numerics: dict[str, str] = dataclasses.field(default_factory=dict)
    """What beside the settings decides the bits: versions of the packages that compute, arithmetic of the PLM."""
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Shapes of the parameters of another run's prompt, by name, if that is what a run begins with."""


def save_checkpoint(paths: RunPaths, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Write a checkpoint with a checksum and the settings that decide the result; then remove old ones."""
    tensors = {**checkpoint.state, "vector": checkpoint.vector}
    metadata = {
        "round": str(checkpoint.round_),
        "record": json.dumps(checkpoint.record.to_json()),
        "settings": json.dumps(compared(to_dict(config), Comparison.RESUME), sort_keys=True),
        "numerics": json.dumps(checkpoint.numerics, sort_keys=True),
    }
    file = paths.checkpoint(checkpoint.round_)
    write_tensors(file, tensors, {**metadata, "sha256": _checksum(tensors, metadata)})
    for old in paths.checkpoints()[KEPT:]:
        old.unlink(missing_ok=True)


def load_checkpoint(paths: RunPaths, settings: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """Read the last good checkpoint of a run directory.

    Args:
        paths: of the directory.
        settings: nested, of the run that goes on from it.

    Returns:
        The checkpoint, or None if there is none yet; and warnings.

    Raises:
        SettingsError: if all are damaged, the run has other settings, or the directory is no run.
    """
    damaged = []
    for file in paths.checkpoints():
        try:
            checkpoint, theirs = _read(file)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, _DamagedError) as error:
            damaged.append(f"{file} is damaged ({error})")
            continue
        _check_settings(paths, theirs, settings)
        return checkpoint, [f"{words}: the one before it is used" for words in damaged]
    if damaged:
        raise SettingsError(f"output.resume: {'; '.join(damaged)}: start anew in another output.dir")
    if paths.directory.is_dir() and not paths.is_empty():
        try:
            theirs = compared(read_settings(paths), Comparison.RESUME)
        except SettingsError as error:
            raise SettingsError(
                f"output.resume: {paths.directory} is not empty, and no run of this program: {error}"
            ) from error
        _check_settings(paths, theirs, settings)
    return None, []


class InMemoryCheckpoint:
    """The state of rank 0 after the last round, from which the run continues when another rank is lost.

    A state that is saved is read again from its file. With a short codec, part of the state is on the other ranks until
    it is saved: then the run continues from the last saved round.
    """

    def __init__(self, config: RunConfig, paths: RunPaths, beginning: Checkpoint) -> None:
        """Keep a copy of a checkpoint, or of the first vector."""
        self._config, self._paths = config, paths
        self.keep(beginning)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep a copy."""
        state = {name: array.copy() for name, array in checkpoint.state.items()}
        self._kept = dataclasses.replace(
            checkpoint, vector=checkpoint.vector.copy(), record=checkpoint.record, state=state
        )

    def latest(self) -> Checkpoint:
        """Return the state after the last round; the caller may change its arrays."""
        saved = load_checkpoint(self._paths, to_dict(self._config))[0] if self._paths.checkpoints() else None
        if saved is not None and saved.round_ >= self._kept.round_:
            return saved
        kept = self._kept
        self.keep(kept)
        return kept


BOUNDED_SUM = "sum of bounded updates"
"""Among the numerics of rules with a bound: earlier versions added their updates up in float64."""


class _DamagedError(Exception):
    """A file is not what was written."""


def _read(file: RunFile) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint and the settings that it belongs to.

    Raises:
        SettingsError: if it is no file of tensors.
        _DamagedError: if its content is not what was written.
    """
    tensors, metadata = read_vector_file(file)
    if _checksum(tensors, metadata) != metadata.pop("sha256", None):
        raise _DamagedError("its checksum differs")
    if metadata.keys() - {"numerics"} != {"round", "record", "settings"}:
        raise _DamagedError("it is no checkpoint")
    vector, settings = tensors.pop("vector"), typed(dict[str, Any], json.loads(metadata["settings"]), "settings")
    round_ = _round_of_name(file)
    if round_ != int(metadata["round"]):
        raise _DamagedError(f"it is of round {metadata['round'][:20]}")
    record = read_round(metadata["record"], round_, {"rounds": round_, "clients": settings["federation.clients"]})
    numerics = typed(dict[str, str], json.loads(metadata.get("numerics", "{}")))
    checkpoint = Checkpoint(vector=vector, round_=round_, record=record, state=tensors, numerics=numerics)
    return checkpoint, settings


def check_numerics(found: Checkpoint, now: Mapping[str, str]) -> None:
    """Raise SettingsError if a checkpoint was made under versions or in an arithmetic that may give other bits."""
    differs = [
        f"{name} {there} (now {here})" for name, (there, here) in differences(found.numerics, now).items() if there
    ]
    if BOUNDED_SUM in now and BOUNDED_SUM not in found.numerics:
        differs.append(f"another {BOUNDED_SUM}")
    if differs:
        raise SettingsError(
            f"output.resume: the run was made with {', '.join(differs)}, and may give other numbers now: use what it "
            "was made with, or continue all the same with --output.other_versions true"
        )


def _round_of_name(file: RunFile) -> int:
    """Return the round in the name of a checkpoint."""
    return int(file.path.stem.removeprefix("round-"))


def _check_settings(paths: RunPaths, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise SettingsError, naming the differences, if a run was made with settings that give another result.

    A setting that the run's version did not have has its default.
    """
    theirs = {**compared(to_dict(RunConfig()), Comparison.RESUME), **theirs}
    differs = [
        f"{name} = {json.dumps(there)} (now {json.dumps(here)})"
        for name, (there, here) in differences(theirs, compared(ours, Comparison.RESUME)).items()
    ]
    if differs:
        more = f" and {len(differs) - MOST_NAMED} more" if len(differs) > MOST_NAMED else ""
        raise SettingsError(
            f"output.resume: {paths.directory} was made with {', '.join(differs[:MOST_NAMED])}{more}: "
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

"""Save and resume, exactly.

The clients' optimiser states start anew each round and all chance comes from (seed, purpose, round, client), so the
global vector, what the server's rule and optimiser remember, and the number of rounds done are the whole state of a
federation.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import read_prompt, write_prompt

CHECKPOINT = Path("checkpoint") / "state.safetensors"


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
    """What the server and an attacker remember from round to round, by name; float32."""


def mathematics(config: RunConfig) -> dict[str, object]:
    """Return the settings that decide the result; how long and how it runs, and what is kept, do not."""
    settings = to_dict(config)
    del settings["output"]
    settings["comm"] = {name: settings["comm"][name] for name in ("collective", "wire")}
    if config.client.schedule == "constant":
        del settings["federation"]["rounds"]
    del settings["model"]["device"]
    settings["poison"].pop("clean_run", None)
    return settings


def save_checkpoint(directory: Path, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Write what a resume needs, with a checksum and the settings it belongs to."""
    file = directory / CHECKPOINT
    file.parent.mkdir(exist_ok=True)
    metadata = {
        "round": str(checkpoint.round_),
        "record": json.dumps(checkpoint.record),
        "sha256": _checksum({**checkpoint.state, "vector": checkpoint.vector}),
        "settings": json.dumps(mathematics(config), sort_keys=True),
    }
    write_prompt(file, {**checkpoint.state, "vector": checkpoint.vector}, metadata)


def load_checkpoint(directory: Path, config: RunConfig) -> Checkpoint:
    """Read the last checkpoint of a run directory.

    Raises:
        SettingsError: if there is none, it is damaged, or it belongs to other settings.
    """
    file = directory / CHECKPOINT
    if not file.is_file():
        raise SettingsError(f"output.resume is true but {file} does not exist: nothing to continue, leave it out")
    tensors, metadata = read_prompt(file)
    if _checksum(tensors) != metadata.get("sha256"):
        raise SettingsError(f"{file} is damaged (its checksum differs): start anew in another output.dir")
    ours, theirs = mathematics(config), json.loads(metadata["settings"])
    for section in sorted({*ours, *theirs}):
        if ours.get(section) != theirs.get(section):
            raise SettingsError(
                f"output.resume: {directory} was made with {section} = {json.dumps(theirs.get(section))}, "
                f"now it is {json.dumps(ours.get(section))}: use the settings of its config.toml"
            )
    vector = tensors.pop("vector")
    record = json.loads(metadata["record"])
    return Checkpoint(vector=vector, round_=int(metadata["round"]), record=record, state=tensors)


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()

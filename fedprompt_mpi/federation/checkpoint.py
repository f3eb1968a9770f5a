"""Save and resume, exactly.

Optimiser states start anew each round and all chance comes from (seed, purpose, round, client), so the
global vector and the number of rounds done are the whole state of a federation.
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

    vector: np.ndarray
    """`[P]` float32."""
    round_: int
    """Rounds done."""
    record: dict[str, Any]
    """The last round's line, which is written once its vector has been evaluated."""


def mathematics(config: RunConfig) -> dict[str, object]:
    """Return the settings that decide the result; how long and how it runs, and what is kept, do not."""
    settings = to_dict(config)
    for name in ("output", "comm"):
        del settings[name]
    if config.client.schedule == "constant":
        del settings["federation"]["rounds"]
    del settings["model"]["device"]
    return settings


def save_checkpoint(directory: Path, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Write what a resume needs, with a checksum of the vector and the settings it belongs to."""
    file = directory / CHECKPOINT
    file.parent.mkdir(exist_ok=True)
    metadata = {
        "round": str(checkpoint.round_),
        "record": json.dumps(checkpoint.record),
        "sha256": hashlib.sha256(checkpoint.vector.tobytes()).hexdigest(),
        "settings": json.dumps(mathematics(config), sort_keys=True),
    }
    write_prompt(file, {"vector": checkpoint.vector}, metadata)


def load_checkpoint(directory: Path, config: RunConfig) -> Checkpoint:
    """Read the last checkpoint of a run directory.

    Raises:
        SettingsError: if there is none, it is damaged, or it belongs to other settings.
    """
    file = directory / CHECKPOINT
    if not file.is_file():
        raise SettingsError(f"output.resume is true but {file} does not exist: nothing to continue, leave it out")
    tensors, metadata = read_prompt(file)
    vector = tensors["vector"]
    if hashlib.sha256(vector.tobytes()).hexdigest() != metadata.get("sha256"):
        raise SettingsError(f"{file} is damaged (its checksum differs): start anew in another output.dir")
    ours, theirs = mathematics(config), json.loads(metadata["settings"])
    for section in sorted({*ours, *theirs}):
        if ours.get(section) != theirs.get(section):
            raise SettingsError(
                f"output.resume: {directory} was made with {section} = {json.dumps(theirs.get(section))}, "
                f"now it is {json.dumps(ours.get(section))}: use the settings of its config.toml"
            )
    return Checkpoint(vector=vector, round_=int(metadata["round"]), record=json.loads(metadata["record"]))

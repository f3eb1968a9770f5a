"""prompt.safetensors: the global vector of a run, its parameters by name, and the effective prompt."""

from pathlib import Path

import numpy as np

from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.files import File, read_tensors, write_tensors
from fedprompt_mpi.rundir.paths import PROMPT, RunPaths


def write_prompt(
    paths: RunPaths, config: RunConfig, vector: np.ndarray, named: dict[str, np.ndarray], round_: int
) -> None:
    """Write the global vector `[P]` after a round, its parameters by name and the effective prompt."""
    metadata = {
        "method": config.prompt.method,
        "model": config.model.name,
        "task": config.task.name,
        "round": str(round_),
    }
    write_tensors(paths.prompt, {"vector": vector, **named}, metadata)


def read_prompt(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a run's prompt: `vector` `[P]`, the parameters by name, the effective prompt; and its metadata.

    Args:
        path: a run directory or its prompt.safetensors.

    Raises:
        SettingsError: if there is no such file, or it is no prompt.
    """
    return read_vector_file(RunPaths(Path(path)).prompt if Path(path).is_dir() else Path(path))


def read_vector_file(file: File) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file of tensors that has a `vector` `[P]`, and its metadata; raises as `read_prompt` does."""
    tensors, metadata = read_tensors(file, f"a prompt: name a run directory or its {PROMPT}")
    if "vector" not in tensors or tensors["vector"].ndim != 1:
        raise SettingsError(f"{file} is no prompt: it has no vector")
    return tensors, metadata

"""What may be asked of the hub, and one brief question to it: its own libraries try for minutes without a network."""

import functools
import os
import re
from typing import Literal

TIMEOUT_S = 4.0
"""Compute nodes often have no network: then nobody answers at all."""

_LOCAL_ENDINGS = (".csv", ".tsv", ".gz", ".zst", ".json", ".jsonl", ".parquet", ".txt", ".toml", ".safetensors", ".bin")


def is_hub_id(name: str) -> bool:
    """Return True if a name may be asked for at a hub: `name` or `owner/name`, with no sign that a path is meant."""
    part = r"[A-Za-z0-9][\w.-]{0,95}"
    if not re.fullmatch(rf"{part}(/{part})?", name, re.ASCII) or name.endswith(_LOCAL_ENDINGS):
        return False
    return not (os.path.lexists(name) or ("/" in name and os.path.lexists(name.split("/")[0])))


@functools.cache
def why_not_had(kind: Literal["model", "dataset"], name: str) -> str:
    """Return why a repository of the hub cannot be had, empty if it can; a copy on this disk may serve all the same."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return "offline mode is on"
    constants.HF_HUB_DISABLE_TELEMETRY = True  # to tell of itself, the library would ask the hub a question before ours
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except Exception as error:  # network, spelling, permission: all end here
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""

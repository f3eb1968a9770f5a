"""The clean run beside a poisoned one: whose attack success rate a model has that nobody attacked."""

import json
from pathlib import Path

from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import MOST_LINES_BYTES, read_text, read_toml

MAY_DIFFER = {
    "task": {"data"},
    "model": {"dtype", "device"},
    "poison": {
        "clients", "rate", "distributed", "mode", "attack", "boost", "norm_bound", "neurotoxin_share", "gaussian_std",
        "clean_run",
    },
    "federation": {
        "rounds", "aggregator", "assumed_malicious", "clip_norm", "outlier_threshold", "flame_noise", "server_examples",
        "noise_std", "server_optimizer", "server_lr", "server_momentum", "server_beta2", "server_tau",
    },
}  # fmt: skip
"""Settings of attack and defence, and of where things are; in all others a clean run agrees with the one beside it."""
SECTIONS = ("task", "model", "prompt", "federation", "client", "poison")


def read_clean_run(config: RunConfig) -> dict[int, float]:
    """Return the attack success rate of each evaluated round of `poison.clean_run`; {} if none is named.

    Raises:
        SettingsError: if it is no run, has malicious clients, or is another run in more than its attack and defence.
    """
    if config.poison.clean_run is None:
        return {}
    named = f"poison.clean_run is {config.poison.clean_run!r}"
    directory = Path(config.poison.clean_run)
    try:
        theirs = read_toml(directory / "config.toml")
        lines = [json.loads(line) for line in read_text(directory / "rounds.jsonl", MOST_LINES_BYTES).splitlines()]
        malicious = theirs["poison"]["clients"]
        rates = {line["round"]: line.get("attack_success_rate") for line in lines}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{named}, which cannot be read as a run ({error!r}): name a run directory") from error
    if malicious:
        raise SettingsError(f"{named}, whose clients {malicious} are malicious: name a run without any")
    ours = to_dict(config)
    may_differ = dict(MAY_DIFFER)
    if config.client.schedule != "constant":  # then the number of rounds is part of every round
        may_differ["federation"] = MAY_DIFFER["federation"] - {"rounds"}
    for section in SECTIONS:
        for name in sorted({*ours[section], *theirs.get(section, {})} - may_differ.get(section, set())):
            there, here = theirs.get(section, {}).get(name), ours[section].get(name)
            if there != here:
                raise SettingsError(
                    f"{named}, which has {section}.{name} = {there!r}, here it is {here!r}: "
                    "name a run that differs in its attack and defence only"
                )
    return {round_: rate for round_, rate in rates.items() if rate is not None}

"""The clean run beside a poisoned one: whose attack success rate a model has that nobody attacked."""

import json
from pathlib import Path

from fedprompt_mpi.comparable import ATTACK_AND_DEFENCE, differences, dotted, with_rounds
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import MOST_LINES_BYTES, read_text, read_toml


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
    left_out = with_rounds(ATTACK_AND_DEFENCE, ours)
    for name, (there, here) in differences(dotted(theirs, left_out), dotted(ours, left_out)).items():
        raise SettingsError(
            f"{named}, which has {name} = {there!r}, here it is {here!r}: "
            "name a run that differs in its attack and defence only"
        )
    return {round_: rate for round_, rate in rates.items() if rate is not None}

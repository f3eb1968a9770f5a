"""The clean run of a poisoned one: it gives the attack success rate without an attack."""

from pathlib import Path

from fedprompt_mpi.config import RunConfig, SettingsError, from_record, to_dict
from fedprompt_mpi.rules.setting import Comparison
from fedprompt_mpi.rundir.directory import check_content
from fedprompt_mpi.rundir.may_differ import compared, differences
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import read_rounds, read_settings


def read_clean_run(config: RunConfig) -> dict[int, float]:
    """Return the attack success rate of each evaluated round of `poison.clean_run`; {} if none is named.

    Raises:
        SettingsError: if it is no run, has malicious clients, or differs in more than its attack. What that changes is
            told by a run of the same seed under the same defence.
    """
    if config.poison.clean_run is None:
        return {}
    named, paths = f"poison.clean_run is {config.poison.clean_run!r}", RunPaths(Path(config.poison.clean_run))
    ours = compared(to_dict(config), Comparison.CLEAN_RUN)
    try:
        check_content(paths, own_only=False)
        settings, rounds = read_settings(paths), read_rounds(paths)
    except SettingsError as error:
        raise SettingsError(f"{named}, which cannot be read as a run: {error}") from error
    malicious, theirs = from_record(settings).malicious, compared(settings, Comparison.CLEAN_RUN)
    if malicious:
        raise SettingsError(f"{named}, whose clients {malicious} are malicious: name a run without any")
    if config.poison.has_trigger and not settings["poison"]["trigger"]:
        raise SettingsError(
            f"{named}, which has no trigger, and so no attack success rate: repeat it with "
            f"--poison.trigger {config.poison.trigger_text!r}"
        )
    for name, (there, here) in differences(theirs, ours).items():
        raise SettingsError(
            f"{named}, which has {name} = {there!r}, here it is {here!r}: "
            "name a run of the same seed, defence and trigger, which differs in its attack only"
        )
    rates = {record.round: record.attack_success_rate for record in rounds}
    return {round_: rate for round_, rate in rates.items() if rate is not None}

"""The command audit: a finished run is repeated, and what it sends is attacked."""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from fedprompt_mpi.audit.lines import canary_words
from fedprompt_mpi.audit.record import AuditRecord
from fedprompt_mpi.commands.settings import add_plugins, command_parser, parse
from fedprompt_mpi.config import AuditAttack, OutputConfig, RunConfig, SettingsError, from_dict
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rundir.directory import check_content
from fedprompt_mpi.rundir.formats import format_seconds
from fedprompt_mpi.rundir.journal import versions
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import read_prompt
from fedprompt_mpi.rundir.records import (
    Environment,
    RoundRecord,
    Summary,
    read_record,
    read_rounds,
    read_settings,
    write_record,
)

ATTACKS: tuple[str, ...] = get_args(AuditAttack)
BACKWARD = 3.0
"""A backward pass with its forward pass, in times a forward pass."""


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Repeat the run and write RUN/audit.json; every rank calls this."""
    parsed = parse(_parser(), arguments)
    load_plugins(parsed.plugin)
    paths = RunPaths(Path(parsed.run))
    check_content(paths, own_only=False)
    config = _config_of(paths, parsed)
    summary, rounds = read_record(paths.summary, Summary), read_rounds(paths)
    if not parsed.other_versions:
        _check_versions(paths)
    if config.privacy.audit == ["canary"]:  # the mechanism alone: no model, no data
        if liveness.rank == 0:
            from fedprompt_mpi.federation.audit import record_of
            from fedprompt_mpi.federation.canary import audit_mechanism

            found = audit_mechanism(config, summary.parameters, liveness.alive)
            print(canary_words(found), flush=True)
            _write(paths, record_of(config, [], 0.0, found))
        return
    audited = _repeated(paths, config)
    if liveness.rank == 0:
        print(_cost(config, rounds), flush=True)
        print(f"the repetition is in {audited.output.dir}; the same command continues it if it is stopped", flush=True)
    from fedprompt_mpi.run import run

    if run(audited, liveness=liveness):  # on rank 0
        _bring_home(paths, RunPaths(Path(str(audited.output.dir))), summary)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("audit", "repeat a finished run, and attack what it sends: what does it betray?")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--attack", default="tokens,labels,membership", help=f"some of {', '.join(ATTACKS)}")
    for name, setting, words in (
        ("rounds", "audit_rounds", "the first so many rounds are attacked"),
        ("texts", "audit_texts", "texts that were not in"),
        ("words", "audit_words", "common words that are looked for"),
        ("shadows", "shadow_clients", "clients that an attack trains itself"),
        ("canaries", "canaries", "of which half are in"),
    ):
        parser.add_argument(f"--{name}", type=int, dest=setting, help=words)
    parser.add_argument("--other_versions", type=bool, default=False, help="also of a run by other versions")
    add_plugins(parser)
    return parser


def _config_of(paths: RunPaths, parsed: argparse.Namespace) -> RunConfig:
    """Return the settings of the run, with those of the audit."""
    attacks = parsed.attack.split(",")
    if unknown := [attack for attack in attacks if attack not in ATTACKS]:
        raise SettingsError(
            f"--attack is {unknown[0][:60]!r}: choose some of {', '.join(ATTACKS)}, with commas between"
        )
    names = ("audit_rounds", "audit_texts", "audit_words", "shadow_clients", "canaries")
    given = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    tables = read_settings(paths)
    return from_dict({**tables, "privacy": {**tables["privacy"], "audit": attacks, **given}})


def _check_versions(paths: RunPaths) -> None:
    """Raise SettingsError if the run was made by other versions, whose repetition could differ."""
    theirs, ours = read_record(paths.environment, Environment).versions, versions()
    differs = [
        f"{name} {there} (now {ours.get(name) or 'none'})" for name, there in theirs.items() if ours.get(name) != there
    ]
    if differs:
        raise SettingsError(
            f"{paths.directory} was made with {', '.join(differs[:3])}, and its repetition may send something else: "
            "use what it was made with, or --other_versions true"
        )


def _repeated(paths: RunPaths, config: RunConfig) -> RunConfig:
    """Return the settings of the repetition: beside the run, in a directory for these attacks."""
    told = json.dumps([getattr(config.privacy, field.name) for field in dataclasses.fields(config.privacy)])
    name = f"{paths.directory.resolve().name}-audit-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return dataclasses.replace(
        config,
        output=OutputConfig(
            dir=str(paths.directory.resolve().with_name(name)),
            resume=True,
            report=False,
            evaluate_every=max(1, config.federation.rounds),
        ),
    )


def _cost(config: RunConfig, rounds: Sequence[RoundRecord]) -> str:
    """Return about how long the repetition and the attacks will take, by the run's own seconds."""
    seconds = [record.seconds for record in rounds if record.round > 0]
    again = sum(one.total - one.evaluate for one in seconds)
    privacy, client = config.privacy, config.client
    clients, steps = config.federation.cohort_size, client.steps * client.batch_size
    trained = clients * steps * len(seconds)
    a_pass = sum(one.train for one in seconds) / max(trained, 1) / BACKWARD
    members = min(clients * steps, privacy.audit_texts)
    backward = privacy.shadow_clients * steps + 2 * (privacy.audit_texts + members + 2 * privacy.audit_words)
    forward = (2 * privacy.shadow_clients + clients + 1) * (privacy.audit_texts + members)
    passes = min(privacy.audit_rounds, len(seconds)) * (BACKWARD * backward + forward)
    return (
        f"{len(seconds)} rounds again, about {format_seconds(again)}; and attacks, about {passes:,.0f} texts through "
        f"the model, about {format_seconds(passes * a_pass)}"
    )


def _bring_home(paths: RunPaths, repeated: RunPaths, summary: Summary) -> None:
    """Write the audit into the run's directory and its page, and say whether the repetition is the run."""
    ours, theirs = read_prompt(str(repeated.prompt.path))[0]["vector"], read_prompt(str(paths.prompt.path))[0]["vector"]
    if ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes():
        print("the repetition has the bits of the run", flush=True)
    else:
        apart = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("nan")
        print(
            f"fedprompt_mpi: warning: the repetition's prompt differs from the run's by up to {apart:.3g}: it was run "
            "on other ranks with more than one client a pass, or on another machine",
            file=sys.stderr,
            flush=True,
        )
    _write(paths, read_record(repeated.audit, AuditRecord))


def _write(paths: RunPaths, audit: AuditRecord) -> None:
    """Write an audit beside what an earlier one of other attacks has found, and the page anew."""
    if paths.audit.exists():
        earlier = read_record(paths.audit, AuditRecord)
        again = {leak.attack for leak in audit.leaks}
        audit = dataclasses.replace(
            audit,
            rounds=sorted({*earlier.rounds, *audit.rounds}),
            leaks=[*(leak for leak in earlier.leaks if leak.attack not in again), *audit.leaks],
            canary=audit.canary or earlier.canary,
            observations=[*(seen for seen in earlier.observations if seen.attack not in again), *audit.observations],
        )
    write_record(paths.audit, audit)
    print(f"audit in {paths.audit}", flush=True)
    if paths.report.exists():
        from fedprompt_mpi.report.page import write_report

        print(f"report in {write_report(paths.directory)}", flush=True)

"""The page of one run: one HTML file that needs no network; its figures are also written as PNG and SVG."""

import base64
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedprompt_mpi.audit.lines import canary_words, name_of, words_of
from fedprompt_mpi.audit.record import AuditRecord
from fedprompt_mpi.config import from_record
from fedprompt_mpi.files import write_text
from fedprompt_mpi.liveness.output import printable
from fedprompt_mpi.report import figures, theme
from fedprompt_mpi.report.communication import is_told
from fedprompt_mpi.report.figures import FIGURES, GROUPS, group_of
from fedprompt_mpi.report.run_data import RunData, read_run
from fedprompt_mpi.rundir.closing_table import (
    attack_kinds,
    filter_words,
    format_interval,
    joined,
    majority,
    poison_words,
    privacy_rows,
    warnings,
)
from fedprompt_mpi.rundir.formats import format_count, format_rate, format_seconds
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Job, mean_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A table of a page."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    values: list[list[str]] | None = None
    """Of a table that can be sorted: what each cell counts as."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page."""

    name: str
    heading: str
    svg: str = ""
    caption: str = ""
    table: Numbers | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number at the head of a page."""

    name: str
    value: str
    note: str = ""


def write_report(directory: Path, *, refresh_s: int | None = None) -> Path:
    """Write the page and the figures of a run into its directory; returns the page.

    Args:
        directory: of a run: finished, under way, or broken off.
        refresh_s: the page asks to be loaded again after so many seconds, while the run continues.

    Raises:
        SettingsError: if it is no run directory.
    """
    run, paths = read_run(directory), RunPaths(directory)
    sections = _figures(run, paths)
    sections += [
        Section(
            name="phases", heading="Time of the parts of a round", table=_phases(run), caption=_phases_caption(run)
        ),
        *([_audit(run.audit)] if run.audit is not None else []),
        Section(name="settings", heading="Settings", text=tomli_w.dumps(run.settings)),
        Section(name="environment", heading="Environment", table=_ranks(run), caption=_versions(run)),
    ]
    page = render(
        title=f"{run.settings['task']['name']}, {run.settings['prompt']['method']}: {run.directory.name}",
        lead=_lead(run),
        tiles=_tiles(run),
        sections=sections,
        refresh_s=None if run.summary else refresh_s,
    )
    write_text(paths.report, page)
    return paths.report.path


def _audit(audit: AuditRecord) -> Section:
    """Return the figures of an audit."""
    rows = [
        [leak.view, leak.attack, leak.by, name_of(leak, name), words_of(figure)]
        for leak in audit.leaks
        for name, figure in leak.figures.items()
    ]
    if audit.canary is not None:
        rows.append(["client", "canary", "scores of canaries", "epsilon", canary_words(audit.canary)])
    caption = (
        f"Attacks on round {', '.join(map(str, audit.rounds)) or 'none'} by the server (each upload, or under secure "
        "aggregation the sum), by a client (the step of the global prompt), and by anybody (the final prompt); with "
        "intervals of 95 %, and what a guess gets."
    )
    table = Numbers(head=["view", "attack", "by", "figure", "value"], rows=rows)
    return Section(name="audit", heading="What it betrays", table=table, caption=caption)


def watch_report(directory: Path, tell: Callable[[Path], None], every_s: float = 5.0) -> None:
    """Write the page again after every round, until the run is finished.

    Args:
        directory: of the run.
        tell: called with the page once there is one.
        every_s: how often to look, in seconds, and how often the page asks to be loaded again.
    """
    seen, told = -1, False
    while True:
        run = read_run(directory)
        if run.summary is not None:
            return
        if len(run.rounds) != seen:
            seen = len(run.rounds)
            page = write_report(directory, refresh_s=round(every_s))
            if not told:
                tell(page)
                told = True
        time.sleep(every_s)


def render(sections: Sequence[Section], **parts: Any) -> str:
    """Fill the template; figures that follow each other stand side by side where there is room."""
    import jinja2

    script = (Path(__file__).parent / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    names = theme.variables()
    blocks = [list(some) for _, some in itertools.groupby(sections, key=lambda section: bool(section.svg))]
    html = environment.get_template("page.html.j2").render(
        light={name: colour for colour, name in names.items()},
        dark={name: theme.ON_DARK[colour] for colour, name in names.items()},
        blocks=blocks, script=script, digest=digest,
        paper=names[theme.PAPER], ink=names[theme.INK], muted=names[theme.MUTED], grid=names[theme.GRID],
        **parts,
    )  # fmt: skip
    return printable(html)  # names of others may hold control characters


def _figures(run: RunData, paths: RunPaths) -> list[Section]:
    """Draw what the run has so far."""
    trained = any(record.round > 0 for record in run.rounds)
    timed = trained and any(round_ > 0 for round_, _, _, _, _ in run.timings)
    has = {
        "rates": bool(run.evaluated), "seconds-by-round": timed, "seconds-by-rank": timed, "timeline": timed,
        "parameters": run.summary is not None, "partition": True, "update-norms": trained,
    }  # fmt: skip
    sections = []
    with theme.style():
        for name, (heading, draw) in FIGURES.items():
            if has[name]:
                svg = theme.save(draw(run), name, paths.figure)
                caption = " ".join((draw.__doc__ or "").split())
                sections.append(
                    Section(name=name, heading=heading, svg=svg, caption=caption, table=_numbers(run, name))
                )
    return sections


def _lead(run: RunData) -> list[str]:
    """Return the lines below the title: who trained what, the attack, and what a reader must know."""
    federation, task, split = run.settings["federation"], run.settings["task"]["name"], run.partition.evaluation
    workers, texts = max(1, len(run.environment.ranks) - 1), sum(c.num_examples for c in run.partition.clients)
    of = "" if split is None else f", evaluated on {split.examples:,} of {split.name}"
    lines = [
        f"{task}: {texts:,} training texts{of}. {run.clients} clients ({federation['partition']}) on {workers} "
        f"worker{'s' if workers > 1 else ''}, {federation['aggregator']}; model {run.settings['model']['name']}; "
        f"seed {run.settings['seed']}.",
        _attack(run),
    ]
    if run.filtered is not None:
        lines.append(f"Before round {run.filtered.round} {'; '.join(filter_words(run.filtered))}.")
    if run.summary is None:
        last = run.rounds[-1].round if run.rounds else 0
        lines.append(f"Not at its end: round {last} of {federation['rounds']} is done.")
    elif run.partition.evaluation is not None:
        lines += [f"Note: {text}." for text in warnings(run.summary, run.partition)]
    for number, job in enumerate(run.environment.earlier):
        later = [*run.environment.earlier[number + 1 :], run.environment][0]
        lines.append(
            f"Resumed after round {job.until}: {_ranks_of(job)} before, {_ranks_of(later)} after. Times of a round are "
            "those of the last job."
        )
    for failure in run.summary.lost_ranks if run.summary else []:
        ranks = ", ".join(map(str, failure.ranks))
        lines.append(f"Lost rank {ranks} in round {failure.round}; the others went on after {failure.seconds:.1f} s.")
    return lines


def _ranks_of(job: Job) -> str:
    hosts = len({rank.host for rank in job.ranks})
    return f"{len(job.ranks)} rank{'s' if len(job.ranks) > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"


def _attack(run: RunData) -> str:
    """Return a sentence about the attack."""
    poison = from_record(run.settings).poison
    if not run.malicious:
        return "No client is malicious."
    named = ", ".join(map(str, run.malicious[:8])) + (" and others" if len(run.malicious) > 8 else "")
    target = run.partition.names[poison.target] if poison.target < len(run.partition.names) else "-"
    parts = [words] if (words := poison_words(poison, target)) else []
    parts += [f"attack on the update: {', '.join(kinds)}"] if (kinds := attack_kinds(poison)) else []
    share = mean_of(run.rounds, "malicious_share")
    weight = "" if share is None else f", with {share:.1%} of the weight"
    who = f"client{'s' if len(run.malicious) > 1 else ''} {named}"
    return f"Malicious: {who} of {run.clients}{weight}: {'; '.join(parts)}."


def _tiles(run: RunData) -> list[Tile]:
    if not run.evaluated:
        return []
    first, last, summary, split = run.evaluated[0], run.evaluated[-1], run.summary, run.partition.evaluation
    interval = format_interval(last.accuracy, split.examples if split else 0)
    beside = joined(interval, f"before: {format_rate(first.accuracy)}", majority(run.partition) if split else "")
    tiles = [
        Tile(name="accuracy", value=format_rate(last.accuracy), note=beside),
        Tile(name="macro F1", value=f"{last.macro_f1 or 0:.4f}", note=f"before: {first.macro_f1 or 0:.4f}"),
    ]
    if last.attack_success_rate is not None:
        clean = last.clean_attack_success_rate
        beside = f"before: {format_rate(first.attack_success_rate)}" if clean is None else f"clean run: {clean:.2%}"
        interval = format_interval(last.attack_success_rate, split.triggered if split else 0)
        turned = "" if last.flip_rate is None else f"turns {format_rate(last.flip_rate)} of the right answers"
        tiles.append(
            Tile(
                name="attack success rate",
                value=format_rate(last.attack_success_rate),
                note=joined(interval, beside, turned),
            )
        )
    if summary is not None:
        tiles += [
            Tile(
                name="a client sends",
                value=format_count(summary.bytes_per_client_round),
                note=f"a round: {summary.parameters:,} parameters, {summary.ratio:.4%} of the model",
            ),
            Tile(
                name="time",
                value=f"{summary.seconds_total:,.1f} s",
                note=f"{summary.seconds_to_first_broadcast or 0:.1f} s until the first broadcast",
            ),
        ]
        for _, words in privacy_rows(summary, from_record(run.settings)):
            value = "no bound" if summary.epsilon is None else f"{summary.epsilon:,.3g}"
            tiles.append(Tile(name="epsilon", value=value, note=words))
    return tiles


def _numbers(run: RunData, name: str) -> Numbers | None:
    """Return the numbers of a figure."""
    if name == "rates":
        keys = ("accuracy", "macro_f1", "attack_success_rate", "clean_attack_success_rate")
        names = ("accuracy", "macro F1", "ASR", "ASR of the clean run")
        there = [i for i, key in enumerate(keys) if any(getattr(r, key) is not None for r in run.evaluated)]
        rows = [[str(r.round), *(_percent(getattr(r, keys[i])) for i in there)] for r in run.evaluated]
        return Numbers(head=["round", *(names[i] for i in there)], rows=rows)
    if name in ("seconds-by-round", "seconds-by-rank"):
        by_round = name == "seconds-by-round"
        key = (lambda round_, rank: round_) if by_round else (lambda round_, rank: rank)
        sums = figures.sum_groups(run, key, of_last_job=not by_round)
        shares = figures.ranks_by_round(run) if by_round else {}
        told = [group for group in GROUPS if group in group_of(run).values()]
        rows = [
            [str(key), *(f"{sums[key].get(group, 0.0) / shares.get(key, 1):.4f}" for group in told)]
            for key in sorted(sums)
            if key > 0 or not by_round
        ]
        return Numbers(head=["round" if by_round else "rank", *told], rows=rows, caption="seconds")
    if name == "timeline":
        round_, groups = figures.typical_round(run), group_of(run)
        rows = [[str(k), phase, groups[phase], f"{s:.6f}"] for r, k, phase, s, _ in run.timings if r == round_]
        return Numbers(head=["rank", "phase", "drawn as", "seconds"], rows=rows, caption=f"round {round_}")
    if name == "parameters" and run.summary is not None:
        summary = run.summary
        sizes = ((run.settings["prompt"]["method"], summary.parameters), ("whole model", summary.plm_parameters))
        rows = [
            [what, f"{number:,}", f"{number / summary.plm_parameters:.4%}", run.bytes_of(number)]
            for what, number in sizes
        ]
        return Numbers(head=["", "parameters", "share", "bytes"], rows=rows)
    if name == "partition":
        words = run.partition.names
        rows = [
            [f"{c.client}{' (malicious)' if c.malicious else ''}", *map(str, c.by_class), str(c.poisoned)]
            for c in run.partition.clients
        ]
        return Numbers(head=["client", *words, "poisoned"], rows=rows, caption="examples")
    if name == "update-norms":
        rows = [
            [str(r.round), *(f"{k}: {'-' if n is None else f'{n:.4f}'}" for k, n in zip(
                r.cohort, r.update_norms, strict=True))]
            for r in run.rounds
            if r.round > 0
        ]  # fmt: skip
        return Numbers(head=["round", "client: norm"], rows=rows)
    return None


def _phases(run: RunData) -> Numbers | None:
    if run.communication is None:
        return None
    keys = ("median", "low", "high", "q05", "q95")
    rows = [
        [name, *("-" if (value := getattr(row, key)) is None else format_seconds(value) for key in keys)]
        for name, row in run.communication.seconds.items()
        if is_told(name, run.communication.mode)
    ]
    bounds = ("at least (95 % sure)", "at most", "5 % of rounds take less than", "5 % more than")
    return Numbers(head=["phase", "median", *bounds], rows=rows)


def _phases_caption(run: RunData) -> str:
    if run.communication is None:
        return "Available once the run is finished."
    figures = run.communication
    told = (
        "waiting and transfer are told apart by a synchronisation before each collective, which itself takes the "
        "overhead"
        if figures.mode == "measure"
        else "waiting and transfer are one figure; comm.mode measure would time each"
    )
    after = f" of the last job, after round {figures.after}," if figures.after else ""
    return (
        f"What a round spends its time on, on the slowest rank, over {figures.rounds} rounds{after} without the first "
        f"{figures.warmup_rounds}; {told}. Phases of different ranks overlap: they do not add up."
    )


def _ranks(run: RunData) -> Numbers:
    rows = [[str(rank.rank), rank.host, rank.device, rank.cores, str(rank.threads)] for rank in run.environment.ranks]
    return Numbers(head=["rank", "host", "device", "cores", "threads"], rows=rows)


def _versions(run: RunData) -> str:
    mpi, versions = run.environment.mpi, run.environment.versions
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    dropout = "dropout on" if run.environment.dropout else "dropout off"
    return f"{mpi.library}; {mpi.transport}; {run.environment.compute_dtype}; {dropout}; {packages}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"

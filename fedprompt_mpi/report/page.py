"""The page of one run: one HTML file that needs no network; its figures are also written as PNG and SVG."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from fedprompt_mpi.files import write_text
from fedprompt_mpi.report import figures, theme
from fedprompt_mpi.report.communication import is_told
from fedprompt_mpi.report.figures import FIGURES, GROUPS, group_of
from fedprompt_mpi.report.run_data import RunData, read_run
from fedprompt_mpi.rundir.formats import format_seconds
from fedprompt_mpi.rundir.paths import RunPaths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """A table of a page."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""


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
        Section(name="phases", heading="Phases of a round", table=_phases(run), caption=_phases_caption(run)),
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


def render(**parts: Any) -> str:
    """Fill the template."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    names = theme.variables()
    return environment.get_template("page.html.j2").render(
        light={name: colour for colour, name in names.items()},
        dark={name: theme.ON_DARK[colour] for colour, name in names.items()},
        paper=names[theme.PAPER], ink=names[theme.INK], muted=names[theme.MUTED], grid=names[theme.GRID],
        **parts,
    )  # fmt: skip


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
    federation, poison = run.settings["federation"], run.settings["poison"]
    workers = max(1, len(run.environment.ranks) - 1)
    lines = [
        f"{run.clients} clients ({federation['partition']}) on {workers} worker{'s' if workers > 1 else ''}, "
        f"{federation['aggregator']}; model {run.settings['model']['name']}; seed {run.settings['seed']}"
    ]
    if run.malicious:
        named = ", ".join(map(str, run.malicious[:8])) + (" and others" if len(run.malicious) > 8 else "")
        lines.append(
            f"Malicious: client {named}; trigger “{poison['trigger']}”, target class {poison['target']}, "
            f"attack {poison['attack']}, boost {poison['boost']:g}"
        )
    if run.summary is None:
        last = run.rounds[-1].round if run.rounds else 0
        lines.append(f"Not at its end: round {last} of {federation['rounds']} is done.")
    for failure in run.summary.lost_ranks if run.summary else []:
        ranks = ", ".join(map(str, failure.ranks))
        lines.append(f"Lost rank {ranks} in round {failure.round}; the others went on after {failure.seconds:.1f} s.")
    return lines


def _tiles(run: RunData) -> list[Tile]:
    if not run.evaluated:
        return []
    first, last, summary = run.evaluated[0], run.evaluated[-1], run.summary
    tiles = [Tile(name="accuracy", value=_percent(last.accuracy), note=f"before: {_percent(first.accuracy)}")]
    if last.attack_success_rate is not None:
        clean = last.clean_attack_success_rate
        note = f"before: {_percent(first.attack_success_rate)}" if clean is None else f"clean run: {clean:.2%}"
        tiles.append(Tile(name="attack success rate", value=f"{last.attack_success_rate:.2%}", note=note))
    if summary is not None:
        tiles += [
            Tile(name="a client sends", value=f"{summary.bytes_per_client_round:,} B", note="a round, each way"),
            Tile(name="parameters", value=f"{summary.parameters:,}", note=f"{summary.ratio:.4%} of the model"),
            Tile(
                name="seconds",
                value=f"{summary.seconds_total:,.1f}",
                note=f"{summary.seconds_to_first_broadcast or 0:.1f} to the first broadcast",
            ),
        ]
        if summary.epsilon is not None:
            tiles.append(Tile(name="epsilon", value=f"{summary.epsilon:.3g}"))
    return tiles


def _numbers(run: RunData, name: str) -> Numbers | None:
    """Return the numbers of a figure."""
    if name == "rates":
        keys = ("accuracy", "macro_f1", "attack_success_rate", "clean_attack_success_rate")
        rows = [[str(r.round), *(_percent(getattr(r, key)) for key in keys)] for r in run.evaluated]
        return Numbers(head=["round", "accuracy", "macro F1", "ASR", "ASR of the clean run"], rows=rows)
    if name in ("seconds-by-round", "seconds-by-rank"):
        by_round = name == "seconds-by-round"
        sums = figures.sum_groups(run, (lambda round_, rank: round_) if by_round else (lambda round_, rank: rank))
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
    return Numbers(head=["phase", "median", "95 % interval from", "to", "5 % quantile", "95 % quantile"], rows=rows)


def _phases_caption(run: RunData) -> str:
    if run.communication is None:
        return "Available once the run is finished."
    told = (
        "waiting and transfer are told apart by a synchronisation before each collective, whose cost is `overhead`"
        if run.communication.mode == "measure"
        else "what is left of the skew is in the transfer; --comm.mode measure tells them apart"
    )
    return (
        f"Seconds of the slowest rank, over {run.communication.rounds} rounds after "
        f"{run.communication.warmup_rounds} of warm-up; {told}."
    )


def _ranks(run: RunData) -> Numbers:
    rows = [[str(rank.rank), rank.host, rank.device, rank.cores, str(rank.threads)] for rank in run.environment.ranks]
    return Numbers(head=["rank", "host", "device", "cores", "threads"], rows=rows)


def _versions(run: RunData) -> str:
    mpi, versions = run.environment.mpi, run.environment.versions
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{mpi.library}; {mpi.transport}; {run.environment.compute_dtype}; {packages}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"

"""The figures of one run, each drawn from a `RunData`; `FIGURES` at the end of the file lists them.

Legend: R ranks, K clients.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fedprompt_mpi.comm.statistics import wilson_interval
from fedprompt_mpi.comm.timing import SECURE, TRANSFERS
from fedprompt_mpi.liveness.output import one_line
from fedprompt_mpi.report.marks import mark_bar, mark_legend, mark_points
from fedprompt_mpi.report.run_data import RunData
from fedprompt_mpi.report.theme import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, SERIES, SKY, VERMILLION
from fedprompt_mpi.rundir.formats import format_seconds

WIDTH, TALLEST = 4.7, 60.0
"""Of a figure, in inches: narrow, so that its letters are large enough on a telephone."""
GROUPS = {
    "train": ("train", "filter"), "evaluate": ("evaluate", "evaluate_clients", "audit"), "pack, copy": ("pack", "copy"),
    "wait": ("wait", "sync"), "transfer": TRANSFERS, "wait + transfer": (), "aggregate": ("aggregate",),
    "checkpoint": ("checkpoint", "residuals"), "secure aggregation": SECURE,
}  # fmt: skip
"""Name in the figures -> phases, for runs in measure mode; in observe mode wait and transfer are one."""
COLOURS = dict(zip(GROUPS, (BLUE, GREEN, PURPLE, GREY, VERMILLION, GREY, ORANGE, SKY, INK), strict=True))
MOST_BARS, MOST_BARS_BY_ROUND = 40, 100
"""More clients are drawn as a colour map, more rounds as means of several."""
MOST_LEGEND = 52
"""Characters of a legend beside each other."""


def figure(rows: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure of a height in inches and its axes, without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, min(rows, TALLEST)), layout="constrained")
    return made, made.subplots(1, columns, **options)


def whole_numbers(axis: Any) -> None:
    """Let the ticks below an axis be whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def rates(run: RunData) -> Any:
    """Accuracy and attack success rate of the global prompt after each round, with 95 % intervals (Wilson).

    The dotted line is the accuracy of always answering the most frequent class.
    """
    made, axis = figure(3.3)
    split = run.partition.evaluation
    curves = (
        ("accuracy", "accuracy", BLUE, "o-", split.examples if split else 0),
        ("attack_success_rate", "attack success rate", VERMILLION, "s--", split.triggered if split else 0),
        ("clean_attack_success_rate", "the clean run's", GREY, "^:", split.triggered if split else 0),
    )
    for key, label, colour, look, count in curves:
        points = [(row.round, getattr(row, key)) for row in run.evaluated if getattr(row, key) is not None]
        if points:
            _rate_curve(made, axis, points, (label, colour, look), count)
    if split is not None:
        share = 100 * split.majority_share
        line = axis.axhline(share, color=MUTED, linewidth=1, linestyle=":", label="most frequent class")
        mark_bar(made, line, "most frequent class", "")
    axis.set(xlabel="round", ylabel="%")
    whole_numbers(axis)
    _legend(axis)
    return made


def _rate_curve(
    made: Any, axis: Any, points: Sequence[tuple[int, float]], style: tuple[str, str, str], count: int
) -> None:
    """Draw a rate by round, with its interval if the number of texts is known."""
    label, colour, look = style
    rounds, values = zip(*points, strict=True)
    (line,) = axis.plot(rounds, [100 * v for v in values], look, color=colour, label=label)
    texts = [f"round {r}: {label} {100 * v:.2f} %" for r, v in points]
    if count:
        low, high = zip(*(wilson_interval(v, count) for v in values), strict=True)
        band = axis.fill_between(rounds, [100 * x for x in low], [100 * x for x in high], color=colour, alpha=0.15,
                                 linewidth=0)  # fmt: skip
        mark_bar(made, band, label, "")
        texts = [f"{text} ({100 * a:.1f} to {100 * b:.1f})" for text, a, b in zip(texts, low, high, strict=True)]
    mark_points(made, line, label, texts)


def seconds_by_round(run: RunData) -> Any:
    """Seconds of each round by phase, stacked; the mean over ranks. A dotted line stands where a run was resumed."""
    made, axis = figure(3.4)
    ranks = ranks_by_round(run)
    sums = sum_groups(run, lambda round_, rank: round_)
    trained = {record.round for record in run.rounds if record.round > 0}
    rounds = sorted(trained & set(sums))
    width = -(-len(rounds) // MOST_BARS_BY_ROUND)
    bins = [rounds[at : at + width] for at in range(0, len(rounds), width)]
    rows = [{g: sum(sums[r][g] / ranks[r] for r in some) / len(some) for g in GROUPS} for some in bins]
    _stack(axis, [some[0] for some in bins], rows, width=0.8 * width)
    several = f", each bar the mean of {width} rounds" if width > 1 else ""
    for job in run.environment.earlier:
        axis.axvline(job.until + 0.5, color=INK, linewidth=1, linestyle=":")
    axis.set(xlabel=f"round{several}", ylabel="seconds, mean over ranks")
    whole_numbers(axis)
    return made


def seconds_by_rank(run: RunData) -> Any:
    """Seconds of each rank by phase, all rounds of the last job together."""
    sums = sum_groups(run, lambda round_, rank: rank, of_last_job=True)
    ranks = sorted(sums)
    made, axis = figure(1.3 + 0.28 * len(ranks))
    _stack(axis, ranks, [sums[rank] for rank in ranks], across=True)
    axis.set(xlabel="seconds, all rounds", ylabel="rank", xlim=(0, None))
    axis.set_yticks(ranks)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    return made


def timeline(run: RunData) -> Any:
    """The phases of each rank in one round.

    Each rank's own clock measures its phases, from the end of the round's broadcast, which is the same moment on all
    ranks. The clocks of two ranks are not compared.
    """
    round_ = typical_round(run)
    of_rank: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for r, rank, phase, seconds, _ in run.timings:
        if r == round_:
            of_rank[rank].append((phase, seconds))
    made, axis = figure(1.5 + 0.3 * len(of_rank))
    groups, seen = group_of(run), set()
    for rank, own in sorted(of_rank.items()):
        ends = np.cumsum([seconds for _, seconds in own])
        zero = next((end for (phase, _), end in zip(own, ends, strict=True) if phase == "broadcast"), 0.0)
        for (phase, seconds), end in zip(own, ends, strict=True):
            group = groups[phase]
            label = None if group in seen else group
            (bar,) = axis.barh(rank, seconds, left=end - seconds - zero, height=0.7, color=COLOURS[group], label=label)
            mark_bar(made, bar, group, f"rank {rank}: {phase} {format_seconds(seconds)}")
            seen.add(group)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set(xlabel=f"seconds after the broadcast of round {round_}", ylabel="rank")
    axis.set_yticks(sorted(of_rank))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    _legend(axis)
    return made


def typical_round(run: RunData) -> int:
    """Return the trained round of median duration, of those of the last job if it did any."""
    after = run.environment.resumed_after
    trained = [record for record in run.rounds if record.round > after] or run.rounds[1:]
    recorded = {round_ for round_, _, _, _, _ in run.timings}
    by_time = sorted((record.seconds.total, record.round) for record in trained if record.round in recorded)
    return by_time[len(by_time) // 2][1]


def parameters(run: RunData) -> Any:
    """Parameters that one client sends in a round beside those of the whole model; steps are tenfold."""
    from matplotlib.ticker import EngFormatter

    made, axis = figure(1.7)
    summary = run.summary
    assert summary is not None  # this figure is drawn of finished runs
    sent, whole = summary.parameters, summary.plm_parameters
    rows = ((sent, summary.ratio, run.settings["prompt"]["method"], BLUE), (whole, 1.0, "whole model", GREY))
    for row, (number, share, name, colour) in enumerate(rows):
        (dot,) = axis.plot([number], [row], "o", color=colour, markersize=9)
        mark_points(
            made, dot, name, [f"{name}: {number:,} parameters, {share:.4%} of the model, {run.bytes_of(number)} bytes"]
        )
        axis.annotate(f"{number:,}", (number, row), (0, 9), textcoords="offset points", ha="center", color=INK)
    axis.set(xscale="log", yticks=[0, 1], xlabel="parameters", ylim=(-0.6, 1.8))
    axis.set_yticklabels([name for _, _, name, _ in rows])
    axis.set_xlim(left=max(1, sent / 30), right=whole * 30)
    axis.xaxis.set_major_formatter(EngFormatter())  # 10 k, 1 M: powers of ten would need mathematical type
    axis.grid(visible=False, axis="y")
    return made


def partition(run: RunData) -> Any:
    """Examples of each class by client; poisoned examples and malicious clients are marked."""
    clients, words = run.partition.clients, [one_line(name) for name in run.partition.names]
    counts = np.array([client.by_class for client in clients])
    if len(clients) > MOST_BARS:
        return _partition_map(counts, words, run.malicious)
    made, axis = figure(1.3 + 0.26 * len(clients))
    left = np.zeros(len(clients))
    for number, word in enumerate(words):
        label, own = f"{number} {word}", counts[:, number]
        colour = SERIES[number % len(SERIES)]
        bars = axis.barh(range(len(clients)), own, left=left, height=0.75, color=colour, label=label)
        for client, bar in enumerate(bars):
            mark_bar(made, bar, label, f"client {client}: {own[client]:,} of class {label}")
        left += own
    poisoned = np.array([client.poisoned for client in clients])
    if poisoned.any():
        edge = {"facecolor": "none", "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
        some = np.flatnonzero(poisoned)  # a bar without length would show its edge
        bars = axis.barh(some, poisoned[some], left=left[some], height=0.75, label="poisoned", **edge)
        for client, bar in zip(some, bars, strict=True):
            mark_bar(made, bar, "poisoned", f"client {client}: {poisoned[client]:,} poisoned copies")
    axis.set(xlabel="examples", yticks=range(len(clients)))
    axis.set_yticklabels([f"client {k}" + (" (malicious)" if k in run.malicious else "") for k in range(len(clients))])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    _legend(axis)
    return made


def _partition_map(counts: np.ndarray, words: Sequence[str], malicious: Iterable[int]) -> Any:
    made, axis = figure(1.2 + 0.3 * len(words))
    shown = axis.imshow(counts.T, aspect="auto", cmap="cividis", interpolation="nearest")
    axis.set(xlabel="client", yticks=range(len(words)))
    axis.set_yticklabels([f"{number} {word}" for number, word in enumerate(words)])
    axis.grid(visible=False)
    made.colorbar(shown, ax=axis, label="examples")
    for client in malicious:
        axis.annotate("v", (client, -0.5), ha="center", va="bottom", color=VERMILLION, fontsize=9, weight="bold")
    return made


def update_norms(run: RunData) -> Any:
    """How far each client moved the prompt in each round (Euclidean norm of its update); malicious ones are marked."""
    made, axis = figure(3.4)
    points: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for record in run.rounds:
        for client, norm in zip(record.cohort, record.update_norms, strict=True):
            if norm is not None:
                points[client].append((record.round, norm))
    named = set()
    for client, norms in sorted(points.items(), key=lambda item: item[0] in run.malicious):
        bad = client in run.malicious
        label = "malicious" if bad else "honest"
        look = (
            {"color": VERMILLION, "marker": "s", "zorder": 3} if bad else {"color": GREY, "alpha": 0.7, "marker": "."}
        )
        (line,) = axis.plot(
            *zip(*norms, strict=True), label=None if label in named else label, linewidth=1.6 if bad else 0.9, **look
        )
        texts = [f"client {client}, round {round_}: {norm:.4g}" for round_, norm in norms]
        mark_points(made, line, label, texts)
        named.add(label)
    axis.set(xlabel="round", ylabel="norm of the update")
    whole_numbers(axis)
    axis.set_ylim(bottom=0)
    _legend(axis)
    return made


def group_of(run: RunData) -> dict[str, str]:
    """Return phase -> group; a resumed run may have changed its mode."""
    synchronised = {round_ for round_, _, phase, _, _ in run.timings if phase == "sync"}
    measures = all(round_ in synchronised for round_, _, phase, _, _ in run.timings if phase == "broadcast")
    return {
        phase: group if measures or group not in ("wait", "transfer") else "wait + transfer"
        for group, phases in GROUPS.items()
        for phase in phases
    }


def ranks_by_round(run: RunData) -> dict[int, int]:
    """Return the number of ranks in each round: it changes when a run is resumed or ranks are lost."""
    return {
        round_: len({k for _, k in pairs})
        for round_, pairs in itertools.groupby(
            sorted({(round_, rank) for round_, rank, _, _, _ in run.timings}), key=lambda pair: pair[0]
        )
    }


def sum_groups(
    run: RunData, key: Callable[[int, int], int], *, of_last_job: bool = False
) -> dict[int, dict[str, float]]:
    """Return key -> group -> seconds, summed over the records whose (round, rank) has that key, or the last job's."""
    groups, earlier = group_of(run), run.environment.earlier
    after = earlier[-1].until if of_last_job and earlier else -1
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for round_, rank, phase, seconds, _ in run.timings:
        if round_ > after:
            sums[key(round_, rank)][groups[phase]] += seconds
    return sums


def _stack(
    axis: Any, places: Sequence[int], rows: Sequence[dict[str, float]], *, width: float = 0.8, across: bool = False
) -> None:
    """Draw stacked bars of rounds, or across of ranks, in the order of `GROUPS`; what took no time has no entry."""
    what = "rank" if across else "round"
    start = np.zeros(len(places))
    draw = axis.barh if across else axis.bar
    for group, colour in COLOURS.items():
        values = np.array([row.get(group, 0.0) for row in rows])
        some = np.flatnonzero(values).tolist()  # zero is not the time of what was not done
        if len(some):
            bars = draw([places[at] for at in some], values[some], width, start[some], color=colour, label=group)
            for at, bar in zip(some, bars, strict=True):
                mark_bar(axis.figure, bar, group, f"{what} {places[at]}: {group} {format_seconds(values[at])}")
        start += values
    _legend(axis)


def legend_above(made: Any, axis: Any) -> None:
    """Put the legend of an axis above the figure, one entry a line: names may be long."""
    mark_legend(made, made.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=1))


def _legend(axis: Any) -> None:
    """Put the legend above the axis, in as many columns as there is room for."""
    handles, names = axis.get_legend_handles_labels()
    columns = next((n for n in (4, 3, 2) if _legend_width(names, n) <= MOST_LEGEND), 1)
    shown = axis.figure.legend(
        handles, names, loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.2
    )
    mark_legend(axis.figure, shown)


def _legend_width(names: Sequence[str], columns: int) -> int:
    """Return about how many characters wide a legend is."""
    return sum(max(map(len, names[at::columns]), default=0) + 5 for at in range(min(columns, len(names))))


FIGURES: dict[str, tuple[str, Callable[[RunData], Any]]] = {
    "rates": ("Accuracy by round", rates),
    "seconds-by-round": ("Time of each round", seconds_by_round),
    "seconds-by-rank": ("Time of each rank", seconds_by_rank),
    "timeline": ("One round, rank by rank", timeline),
    "parameters": ("What a client sends", parameters),
    "partition": ("Who holds which texts", partition),
    "update-norms": ("Size of the updates", update_norms),
}
"""Name of the file -> heading, and what draws it."""

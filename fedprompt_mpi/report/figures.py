"""The figures of one run, each drawn from a `RunData`; `FIGURES` at the end of the file lists them.

Legend: R ranks, K clients.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fedprompt_mpi.comm.codec import CODECS
from fedprompt_mpi.comm.timing import TRANSFERS
from fedprompt_mpi.report.run_data import RunData
from fedprompt_mpi.report.theme import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SERIES, SKY, VERMILLION

WIDTH, TALLEST = 9.0, 60.0
"""Of a figure, in inches."""
GROUPS = {
    "train": ("train",), "evaluate": ("evaluate", "evaluate_clients"), "pack, copy": ("pack", "copy"),
    "wait": ("wait", "sync"), "transfer": TRANSFERS, "wait + transfer": (), "aggregate": ("aggregate",),
    "checkpoint": ("checkpoint", "residuals"),
}  # fmt: skip
"""Name in the figures -> phases, for runs in measure mode; in observe mode wait and transfer are one."""
COLOURS = dict(zip(GROUPS, (BLUE, GREEN, PURPLE, GREY, VERMILLION, GREY, ORANGE, SKY), strict=True))
MOST_BARS, MOST_BARS_BY_ROUND = 40, 100
"""More clients are drawn as a colour map, more rounds as means of several."""


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
    """Accuracy and attack success rate of the global prompt, in percent, by round."""
    made, axis = figure(3.4)
    lines = run.evaluated
    curves = (
        ("accuracy", "accuracy", BLUE, "o-"),
        ("attack_success_rate", "attack success rate", VERMILLION, "s--"),
        ("clean_attack_success_rate", "attack success rate of the clean run", GREY, "^:"),
    )
    for key, label, colour, line in curves:
        points = [(row.round, 100 * getattr(row, key)) for row in lines if getattr(row, key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), line, color=colour, label=label)
    axis.set(xlabel="round", ylabel="%", ylim=(-2, 102))
    whole_numbers(axis)
    _legend(axis)
    return made


def seconds_by_round(run: RunData) -> Any:
    """Seconds of each round by phase, stacked; the mean over ranks."""
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
    axis.set(xlabel=f"round{several}", ylabel="seconds, mean over ranks")
    whole_numbers(axis)
    return made


def seconds_by_rank(run: RunData) -> Any:
    """Seconds of each rank by phase, all rounds together."""
    sums = sum_groups(run, lambda round_, rank: rank)
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
            axis.barh(rank, seconds, left=end - seconds - zero, height=0.7, color=COLOURS[group], label=label)
            seen.add(group)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set(xlabel=f"seconds after the broadcast of round {round_}", ylabel="rank")
    axis.set_yticks(sorted(of_rank))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    _legend(axis)
    return made


def typical_round(run: RunData) -> int:
    """Return the trained round of median duration."""
    trained = [record for record in run.rounds if record.round > 0]
    recorded = {round_ for round_, _, _, _, _ in run.timings}
    by_time = sorted((record.seconds.total, record.round) for record in trained if record.round in recorded)
    return by_time[len(by_time) // 2][1]


def parameters(run: RunData) -> Any:
    """Parameters that one client sends in a round, beside those of the whole model, with share and bytes."""
    from matplotlib.ticker import EngFormatter

    made, axis = figure(1.9)
    summary = run.summary
    assert summary is not None  # this figure is drawn of finished runs
    sent, whole = summary.parameters, summary.plm_parameters
    axis.barh([0, 1], [sent, whole], color=[BLUE, GREY], height=0.6)
    axis.set(xscale="log", yticks=[0, 1], xlabel="parameters, each way, a client and round", ylim=(-0.6, 1.6))
    axis.set_yticklabels([run.settings["prompt"]["method"], "full fine-tuning"])
    axis.invert_yaxis()
    axis.set_xlim(left=max(1, sent / 20), right=whole * 5000)
    axis.xaxis.set_major_formatter(EngFormatter())  # 10 k, 1 M: powers of ten would need mathematical type
    for row, (number, share) in enumerate(((sent, summary.ratio), (whole, 1.0))):
        size = CODECS[run.settings["comm"]["wire"]].bytes_of(number)
        axis.text(number * 1.15, row, f"{number:,}   {share:.4%}   {size:,} bytes", va="center", color=INK)
    axis.grid(visible=False, axis="y")
    return made


def partition(run: RunData) -> Any:
    """Examples of each class by client; poisoned examples and malicious clients are marked."""
    clients, words = run.partition.clients, run.partition.names
    counts = np.array([client.by_class for client in clients])
    if len(clients) > MOST_BARS:
        return _partition_map(counts, words, run.malicious)
    made, axis = figure(1.3 + 0.26 * len(clients))
    left = np.zeros(len(clients))
    for number, word in enumerate(words):
        axis.barh(range(len(clients)), counts[:, number], left=left, height=0.75, color=SERIES[number % len(SERIES)],
                  label=f"{number} {word}")  # fmt: skip
        left += counts[:, number]
    poisoned = np.array([client.poisoned for client in clients])
    if poisoned.any():
        edge = {"facecolor": "none", "edgecolor": INK, "hatch": "///", "linewidth": 0.8}
        axis.barh(range(len(clients)), poisoned, left=left, height=0.75, label="poisoned", **edge)
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
    """Euclidean norm of each client's update by round; malicious clients are marked."""
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
        axis.plot(
            *zip(*norms, strict=True), label=None if label in named else label, linewidth=1.6 if bad else 0.9, **look
        )
        named.add(label)
    axis.set(xlabel="round", ylabel="Euclidean norm of the update")
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


def sum_groups(run: RunData, key: Callable[[int, int], int]) -> dict[int, dict[str, float]]:
    """Return key -> group -> seconds, summed over the records whose (round, rank) has that key."""
    groups = group_of(run)
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for round_, rank, phase, seconds, _ in run.timings:
        sums[key(round_, rank)][groups[phase]] += seconds
    return sums


def _stack(
    axis: Any, places: Sequence[int], rows: Sequence[dict[str, float]], *, width: float = 0.8, across: bool = False
) -> None:
    """Draw stacked bars, one a place, in the order of `GROUPS`; groups without time are not in the legend."""
    start = np.zeros(len(places))
    draw = axis.barh if across else axis.bar
    for group, colour in COLOURS.items():
        values = np.array([row.get(group, 0.0) for row in rows])
        if values.any():
            draw(places, values, width, start, color=colour, label=group)
        start += values
    _legend(axis)


def legend_above(made: Any, axis: Any) -> None:
    """Put the legend of an axis above the figure, one entry a line: names may be long."""
    made.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=1)


def _legend(axis: Any) -> None:
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=7, columnspacing=1.2, handlelength=1.2)


FIGURES: dict[str, tuple[str, Callable[[RunData], Any]]] = {
    "rates": ("Accuracy and attack success rate", rates),
    "seconds-by-round": ("Seconds by round", seconds_by_round),
    "seconds-by-rank": ("Seconds by rank", seconds_by_rank),
    "timeline": ("Timeline of one round", timeline),
    "parameters": ("Parameters sent by a client", parameters),
    "partition": ("Partition of the training data", partition),
    "update-norms": ("Update norms", update_norms),
}
"""Name of the file -> heading, and what draws it."""

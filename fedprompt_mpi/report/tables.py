"""The paper's tables, filled from run directories, as Markdown, CSV and LaTeX.

References:
    Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Tables I to III, Figure 3 and Section 4.
"""

import collections
import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

from fedprompt_mpi.report.groups import Group, both_rates, percent, who_is_poisoned
from fedprompt_mpi.report.inert import csv_cell, latex, markdown

Settings = dict[str, Any]
PARTITIONS: dict[str, str] = {"iid": "IID", "quantity": "non-IID"}
LENGTH, STEPS, ROUNDS = "prompt.num_virtual_tokens", "client.steps", "federation.rounds"
"""Settings that a table varies, or holds where most runs have them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells; the first row has the columns' names."""

    name: str
    caption: str
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return it for a README."""
        head, *body = [[markdown(cell) for cell in row] for row in self.rows]
        lines = [head, ["---"] * len(head), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def csv(self) -> str:
        """Return it for a spreadsheet."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([csv_cell(cell) for cell in row] for row in self.rows)
        return text.getvalue()

    def latex(self) -> str:
        """Return it for a paper; needs the package booktabs."""
        head, *body = [" & ".join(latex(cell) for cell in row) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}", r"\centering", rf"\caption{{{latex(self.caption)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.rows[0]) - 1)}}}", r"\toprule", head, r"\midrule", *body,
                r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
            ]
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The definition of a table: which groups it takes, and the row and column of each."""

    name: str
    caption: str
    wants: Callable[[Group], bool]
    row: Callable[[Settings], Any]
    column: Callable[[Settings], Any]
    cell: Callable[[Group], str] = both_rates
    held: tuple[str, ...] = (LENGTH, STEPS, ROUNDS)
    """Settings whose most common value the table's runs must have."""
    compares: tuple[str, ...] = ()
    """Settings that the table compares; it is left out if each has a single value."""


def _is_plain(known: Group) -> bool:
    """Return True for a federation as in the paper: soft prompt, FedAvg, no privacy mechanism."""
    s = known.settings
    return s["prompt.method"] == "soft" and s["federation.aggregator"] == "fedavg" and s["privacy.mechanism"] == "none"


def _model_and_partition(s: Settings) -> tuple[str, str]:
    partition: str = s["federation.partition"]
    return s["model.name"], PARTITIONS.get(partition, partition)


def _sent(known: Group) -> str:
    summary = known.runs[0].summary
    return "-" if summary is None else f"{summary.parameters:,} ({summary.ratio:.4%})"


def _epsilon(known: Group) -> str:
    """Return the epsilon of runs with a privacy mechanism; nothing of others."""
    if known.settings["privacy.mechanism"] == "none":
        return ""
    spread = known.spread("epsilon")
    return "no bound" if spread is None else f"{spread[0]:,.4g}"


def _rates_and_epsilon(known: Group) -> str:
    return both_rates(known) + (f", epsilon {_epsilon(known)}" if _epsilon(known) else "")


PLANS = (
    _Plan(
        name="table-1", caption="Accuracy / ASR of a clean federation, % (FedPrompt, Table I)",
        wants=lambda known: _is_plain(known) and not known.is_poisoned,
        row=lambda s: s["task.name"], column=_model_and_partition,
    ),
    _Plan(
        name="table-2", caption="Parameters that a client sends, and their share of the PLM (FedPrompt, Table II)",
        wants=lambda known: not known.is_poisoned, cell=_sent, held=(LENGTH,),
        row=lambda s: s["prompt.method"], column=lambda s: (s["model.name"],),
    ),
    _Plan(
        name="methods", caption="Accuracy / ASR of each method, clean, % (FedPrompt, Table I, lower part)",
        wants=lambda known: not known.is_poisoned and known.settings["privacy.mechanism"] == "none",
        row=lambda s: f"{s['task.name']}, {s['prompt.method']}", column=_model_and_partition,
        compares=("prompt.method",),
    ),
    _Plan(
        name="table-3", caption="Accuracy / ASR with poisoned clients, % (FedPrompt, Table III)",
        wants=lambda known: _is_plain(known) and known.is_poisoned,
        row=lambda s: (s["task.name"], who_is_poisoned(s)), column=_model_and_partition,
    ),
    _Plan(
        name="prompt-length", caption="Accuracy / ASR by the number of virtual tokens, % (FedPrompt, Section 4)",
        wants=lambda known: _is_plain(known) and not known.is_poisoned, held=(STEPS, ROUNDS),
        row=lambda s: s["prompt.num_virtual_tokens"], column=lambda s: (s["task.name"], *_model_and_partition(s)),
        compares=(LENGTH,),
    ),
    _Plan(
        name="local-steps", caption="Accuracy / ASR by local steps in a round, % (FedPrompt, Section 4)",
        wants=lambda known: _is_plain(known) and not known.is_poisoned, held=(LENGTH,),
        row=lambda s: (s["client.steps"], f"{s['federation.rounds']} rounds"),
        column=lambda s: (s["task.name"], *_model_and_partition(s)), compares=(STEPS, ROUNDS),
    ),
    _Plan(
        name="privacy", caption="Accuracy / ASR with and without noise on what is uploaded, % (FedPrompt, Section 4)",
        wants=lambda known: known.settings["prompt.method"] == "soft" and not known.is_poisoned,
        row=lambda s: s["privacy.mechanism"], column=lambda s: (s["task.name"], *_model_and_partition(s)),
        cell=_rates_and_epsilon, compares=("privacy.mechanism",),
    ),
)  # fmt: skip


def has_numbers(table: Table) -> bool:
    """Return True if a table has more than dashes."""
    return any(any(letter.isdigit() for letter in cell) for row in table.rows[1:] for cell in row[1:])


def overview(groups: Sequence[Group], names: Sequence[str]) -> Table:
    """Return one row per group: its settings and its results."""
    has_noise = any(_epsilon(known) for known in groups)
    rows = [["runs", "seeds", "accuracy, %", "ASR, %", "parameters (share)", "bytes", "seconds"]]
    rows[0] += ["epsilon"] if has_noise else []
    for known, name in zip(groups, names, strict=True):
        summary = known.runs[0].summary if all(run.summary for run in known.runs) else None
        seconds = known.spread("seconds_total")
        rows.append(
            [
                name,
                ", ".join(map(str, known.seeds)),
                percent(known.spread("accuracy")),
                percent(known.spread("attack_success_rate")),
                "-" if summary is None else _sent(known),
                "-" if summary is None else f"{summary.bytes_per_client_round:,}",
                "-" if seconds is None else f"{seconds[0]:.0f}",
                *([_epsilon(known) or "-"] if has_noise else []),
            ]
        )
    return Table(name="overview", caption="Over seeds: mean and standard deviation", rows=rows)


def paper_tables(groups: Sequence[Group]) -> list[Table]:
    """Return the paper's tables that can be filled, from the groups of finished runs."""
    done = [known for known in groups if all(run.summary for run in known.runs)]
    if not done:
        return []
    usual = {name: _most_common(known.settings.get(name) for known in done) for name in (LENGTH, STEPS, ROUNDS)}
    tables = []
    for plan in PLANS:
        chosen = [g for g in done if plan.wants(g) and all(g.settings.get(name) == usual[name] for name in plan.held)]
        compared = {tuple(known.settings.get(name) for name in plan.compares) for known in chosen}
        if len(compared) > (1 if plan.compares else 0):
            tables.append(_fill(plan, chosen))
    return tables


def _fill(plan: _Plan, chosen: Sequence[Group]) -> Table:
    cells: dict[tuple[Any, Any], list[str]] = collections.defaultdict(list)
    for known in chosen:
        text = plan.cell(known)
        place = cells[plan.row(known.settings), plan.column(known.settings)]
        if text not in place:
            place.append(text)
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    body = [
        [
            ", ".join(map(str, row)) if isinstance(row, tuple) else str(row),
            *("; ".join(cells.get((row, column), ["-"])) for column in columns),
        ]
        for row in rows
    ]
    head = [" ".join(map(str, column)) for column in columns]
    return Table(name=plan.name, caption=plan.caption, rows=[["", *head], *body])


def _most_common(values: Any) -> Any:
    return collections.Counter(values).most_common(1)[0][0]

"""The answer in words: a table of phases, notes, and a JSON object with the same figures."""

from typing import Any

from fedprompt_mpi.forecast.answer import GRID, LEFT_OUT, Answer
from fedprompt_mpi.forecast.estimate import Estimate
from fedprompt_mpi.forecast.model import Forecast
from fedprompt_mpi.forecast.speeds import EQUAL
from fedprompt_mpi.rundir.formats import format_count, format_seconds

PHASES = ("broadcast", "evaluate", "train", "wait", "pack", "gather", "reduce", "aggregate", "checkpoint")
FAR = ("to the server", "a client down", "a client up", "server out", "server in")
WIDTH = 34
"""Of a column."""


def format_answer(answer: Answer) -> str:
    """Return the table of an answer, and what follows from it."""
    asked, place = answer.question, answer.forecasts[0].scenario.place
    if not asked.is_cluster:
        return _far_away(answer)
    lines = [
        f"{asked.clients:,} clients in a round; nodes: {place.nodes:,}, ranks of each: {place.ranks_per_node}, "
        f"workers: {place.workers:,}, clients of a worker: up to {place.most_on_a_worker:,}",
        f"network: {answer.network.name} ({answer.network.source})",
        "seconds of a round, with the interval that is to hold 95 %",
        "",
        _row("", [answer.name_of(one) for one in answer.forecasts]),
    ]
    for phase in (name for name in PHASES if any(name in one.phases for one in answer.forecasts)):
        lines.append(_row(phase, [_seconds(one.phases.get(phase)) for one in answer.forecasts]))
    lines.append(_row("round", [_seconds(one.round) for one in answer.forecasts]))
    lines.append(_row(f"hours of {asked.rounds:,} rounds", [_hours(one, asked.rounds) for one in answer.forecasts]))
    for name, key in (
        ("to the server", "bytes_up"),
        ("from the server", "bytes_down"),
        ("on all links", "bytes_total"),
    ):
        lines.append(_row(name, [format_count(getattr(one, key)) for one in answer.forecasts]))
    lines.append(_row("memory of rank 0", [format_count(one.memory) for one in answer.forecasts]))
    lines += ["", *_clients(answer), *_conclusions(answer)]
    if asked.speeds.are_equal and asked.speeds is not EQUAL:
        lines += ["", f"clients' speeds: {asked.speeds.name}; all of them take the same time"]
    elif not asked.speeds.are_equal:
        lines += ["", *_waiting(answer)]
    notes = answer.extrapolations()
    if notes:
        lines += ["", "Not measured, so forecast beyond the sources; to know more:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<22}" + "".join(f"  {cell:>{WIDTH}}" for cell in cells)


def _seconds(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = estimate.interval
    return f"{format_seconds(estimate.seconds)} ({format_seconds(low)} - {format_seconds(high)})"


def _hours(one: Forecast, rounds: int) -> str:
    hours, low, high = (rounds * seconds / 3600 for seconds in (one.round.seconds, *one.round.interval))
    return f"{hours:,.3g} ({low:,.3g} - {high:,.3g})"


def _clients(answer: Answer) -> list[str]:
    """Return what a client takes, and where that was measured."""
    found: dict[str, str] = {}
    for (method, _, _), model in answer.models.items():
        run = model.run
        found[run.source] = f"{method}: a client trains {_seconds(model.client())} on {run.device}, in {run.source}"
    return [*found.values()]


def _conclusions(answer: Answer) -> list[str]:
    lines = []
    for name, found in answer.saturation().items():
        if found is None:
            lines.append(f"{name}: vectors travel for less than half of a round, up to 1,000,000 clients")
            continue
        least, most = found
        until = "" if most == GRID[-1] else f" to {most:,}"
        lines.append(f"{name}: from about {least:,}{until} clients vectors travel for more than half of a round")
    for name, clients in answer.overtaken().items():
        lines.append(
            f"{name}: up to 1,000,000 clients reduce is not faster than gather beyond the errors" if clients is None
            else f"{name}: from about {clients:,} clients on reduce is faster than gather, beyond the errors"
        )  # fmt: skip
    return lines


def _waiting(answer: Answer) -> list[str]:
    """Return what unequal clients cost, and what a round gains without the slowest of them."""
    lines = [f"clients' speeds: {answer.question.speeds.name}; a round that does not wait for the slowest clients"]
    lines.append(f"{'not waited for':<34}" + "".join(f"{share:>14.0%}" for share in LEFT_OUT))
    for name, forecasts in answer.without_slowest.items():
        lines.append(f"{name:<34}" + "".join(f"{format_seconds(one.round.seconds):>14}" for one in forecasts))
        waits = "".join(f"{format_seconds(one.waiting):>14}" for one in forecasts)
        lines.append(f"{'  of which the mean worker waits':<34}{waits}")
    lines.append(f"{'examples lost':<34}" + "".join(f"{share:>14.1%}" for share in answer.examples_lost()))
    return lines


def _far_away(answer: Answer) -> str:
    """Return what a network on which MPI would not run takes: bytes, and their time on the links."""
    asked, network = answer.question, answer.network
    lines = [
        f"{asked.clients:,} clients in a round over {network.name}: MPI is not what would run there. What holds is the "
        "number of bytes, and the time that links of these rates need for them at least.",
        f"{'':<22}{'a client, each way':>20}" + "".join(f"{name:>16}" for name in FAR),
    ]
    for one in answer.forecasts:
        found = _on_links(answer, one)
        cells = [format_count(found["bytes_to_server"])]
        cells += [
            format_seconds(found[f"{name}_s"]) for name in ("client_down", "client_up", "server_out", "server_in")
        ]
        size = format_count(one.vector.bytes)
        lines.append(f"{answer.name_of(one):<22}{size:>20}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _on_links(answer: Answer, one: Forecast) -> dict[str, float]:
    """Return the bytes of a round, and the seconds that each link needs for them."""
    network, size, clients = answer.network, one.vector.bytes, answer.question.clients
    down, up = (size * network.seconds_per_byte(up=way, server=False) + network.latency_s for way in (False, True))
    out, into = (clients * size * network.seconds_per_byte(up=way, server=True) for way in (True, False))
    return {
        "bytes_of_a_client": size, "bytes_to_server": clients * size, "bytes_from_server": clients * size,
        "client_down_s": down, "client_up_s": up, "server_out_s": out, "server_in_s": into,
    }  # fmt: skip


def to_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as a JSON object; seconds with the ends of their 95 % intervals."""
    asked = answer.question
    head: dict[str, Any] = {"clients": asked.clients, "network": answer.network.name, "source": answer.network.source}
    head["mpi"] = answer.network.mpi
    if not asked.is_cluster:
        return {**head, "forecasts": [{**_way(one), **_on_links(answer, one)} for one in answer.forecasts]}
    return {
        **head,
        "nodes": asked.nodes,
        "ranks_per_node": asked.ranks_per_node,
        "rounds": asked.rounds,
        "forecasts": [
            {
                **_way(one),
                "phases": {name: _told(own) for name, own in one.phases.items()},
                "round": _told(one.round),
                "hours": asked.rounds * one.round.seconds / 3600,
                "bytes_to_server": one.bytes_up,
                "bytes_from_server": one.bytes_down,
                "bytes_total": one.bytes_total,
                "memory_bytes": one.memory,
                "mean_worker_waits_s": one.waiting,
                "client_trains": _told(answer.models[_key(one)].client()),
                "measured_in": answer.models[_key(one)].run.source,
            }
            for one in answer.forecasts
        ],
        "link_is_half_of_a_round_between": answer.saturation(),
        "reduce_is_faster_from": answer.overtaken(),
        "speeds": asked.speeds.name,
        "not_waited_for": {
            "share": LEFT_OUT,
            "examples_lost": answer.examples_lost(),
            "round_s": {name: [one.round.seconds for one in own] for name, own in answer.without_slowest.items()},
        },
        "extrapolated": answer.extrapolations(),
    }


def _key(one: Forecast) -> tuple[str, str, str]:
    return one.method, one.scenario.collective, one.scenario.wire


def _way(one: Forecast) -> dict[str, str]:
    return dict(zip(("method", "collective", "wire"), _key(one), strict=True))


def _told(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval
    return {"seconds": estimate.seconds, "low": low, "high": high}

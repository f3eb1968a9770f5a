"""The command forecast: what a federation would cost elsewhere, from measured runs and results of bench."""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import write_json
from fedprompt_mpi.forecast.answer import Answer, Question
from fedprompt_mpi.forecast.costs import Placement
from fedprompt_mpi.forecast.lines import format_answer, to_json
from fedprompt_mpi.forecast.network import Network, presets, read_network
from fedprompt_mpi.forecast.score import format_scores, score_run
from fedprompt_mpi.forecast.sources import Measured, read_sources
from fedprompt_mpi.forecast.speeds import read_speeds
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.directory import make_output_directory

MOST_CLIENTS, MOST_RANKS = 10_000_000, 100_000


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print the answer, and write it with its figure; or print how well a forecast did."""
    parser = command_parser("forecast", "what a federation would cost with other clients, nodes and networks")
    parser.add_argument("sources", nargs="+", help="run directories, and folders of bench.json")
    parser.add_argument("--clients", type=int, help="clients of a round; by default those of the first run")
    parser.add_argument("--nodes", type=int, help="by default those of the network, or of the sources")
    parser.add_argument("--ranks-per-node", type=int, help="by default those of the network, or of the sources")
    parser.add_argument("--network", help=f"a TOML file, or {', '.join(presets())}; by default as measured")
    parser.add_argument("--measured-on", help="the network on which the sources were measured: a file or a preset too")
    parser.add_argument("--method", help="such as soft,lora; by default all measured ones")
    parser.add_argument("--collective", help="gather, reduce or both; by default that of the runs")
    parser.add_argument("--wire", help="formats of vectors; by default those of the runs")
    parser.add_argument("--rounds", type=int, help="of the whole run; by default those of the first source")
    parser.add_argument("--speeds", default="equal", help="lognormal:SIGMA, uniform:RATIO, a CSV file of rates, or run")
    parser.add_argument("--score", help="a run directory: compare its forecast with what it took")
    parser.add_argument("--json", action="store_true", help="print JSON alone, and write nothing")
    parser.add_argument("--dir", help="folder of forecast.json and the figure; by default runs/forecast-<time>")
    parsed = parse(parser, arguments)
    _check(parsed)
    measured, is_scored = read_sources(parsed.sources), parsed.score is not None
    network = read_network(parsed.network, runs_mpi=is_scored) if parsed.network is not None else None
    measured_on = None
    if parsed.measured_on is not None:
        measured_on = read_network(parsed.measured_on, "--measured-on", runs_mpi=True)
    if is_scored:
        scores = score_run(Path(parsed.score), measured, measured_on, network)
        shown = json.dumps([one.to_json() for one in scores], indent=2)
        print(shown if parsed.json else format_scores(scores, Path(parsed.score)))
        return
    answer = Answer(_question(parsed, measured, measured_on, network), measured)
    if parsed.json:
        print(json.dumps(to_json(answer), indent=2))
        return
    print(format_answer(answer))
    _write(answer, parsed.dir)


def _check(parsed: Namespace) -> None:
    """Raise SettingsError if flags are given that others leave without a meaning."""
    asked = ("clients", "nodes", "ranks_per_node", "method", "collective", "wire", "rounds", "speeds", "dir")
    given = [name for name in asked if getattr(parsed, name) not in (None, "equal")]
    if parsed.score is not None and given:
        raise SettingsError(f"--score takes the run as it is: leave out --{given[0].replace('_', '-')}")
    if parsed.json and parsed.dir is not None:
        raise SettingsError("--json writes no files: leave out --dir")


def _question(parsed: Namespace, measured: Measured, measured_on: Network | None, network: Network | None) -> Question:
    """Return what the flags ask, with the network's and the sources' own figures where they say nothing.

    Raises:
        SettingsError: naming a flag, its value and what it accepts.
    """
    if not measured.runs:
        raise SettingsError(
            "no source is a run, and a round is more than its collectives: run python -m fedprompt_mpi --comm.mode "
            "measure and name its directory beside that of bench"
        )
    first, runs = measured.runs[0], measured.runs
    clients = _number(parsed.clients, "clients", first.place.clients, MOST_CLIENTS)
    nodes, ranks = _default_nodes(parsed, network, first.place, clients)
    methods = _names(parsed.method, "method", measured.methods, registry.methods)
    collectives = list(dict.fromkeys(run.collective for run in runs))
    wires = list(dict.fromkeys(run.wire for run in runs))
    return Question(
        clients=clients,
        nodes=_number(parsed.nodes, "nodes", nodes, MOST_RANKS),
        ranks_per_node=_number(parsed.ranks_per_node, "ranks-per-node", ranks, MOST_RANKS),
        network=network,
        measured_on=measured_on,
        methods=methods,
        collectives=_names(parsed.collective, "collective", collectives, ("gather", "reduce")),
        wires=_names(parsed.wire, "wire", wires, registry.wire_formats),
        speeds=read_speeds(parsed.speeds, measured.run_of(methods[0]).times),
        rounds=_number(parsed.rounds, "rounds", first.config.federation.rounds, MOST_CLIENTS),
    )


def _default_nodes(parsed: Namespace, network: Network | None, place: Placement, clients: int) -> tuple[int, int]:
    """Return the nodes and ranks of each that are meant if no flag says so: as many as have clients.

    Raises:
        SettingsError: if flags ask for more than bytes where MPI would not run.
    """
    nodes, ranks = place.nodes, place.ranks_per_node
    if network is not None and not network.mpi:
        given = [name for name in ("nodes", "ranks_per_node", "rounds", "dir") if getattr(parsed, name) is not None]
        given += ["speeds"] if parsed.speeds != "equal" else []
        if given:
            flag = given[0].replace("_", "-")
            raise SettingsError(f"--network is {parsed.network!r}, where only bytes are told: leave out --{flag}")
        return 1, 1
    if network is not None and network.nodes is not None:
        nodes, ranks = network.nodes, network.ranks_per_node
    ranks = min(parsed.ranks_per_node or ranks, clients + 1)
    return max(1, min(nodes, (clients + 1) // ranks)), ranks


def _number(given: int | None, flag: str, default: int, most: int) -> int:
    """Return the number of a flag, or the default.

    Raises:
        SettingsError: if it is out of bounds.
    """
    value = default if given is None else given
    if not 1 <= value <= most:
        raise SettingsError(f"--{flag} is {value}: give a number from 1 to {most:,}")
    return value


def _names(given: str | None, flag: str, default: list[str], known: Iterable[str]) -> list[str]:
    """Return the names of a flag, which are parted by commas.

    Raises:
        SettingsError: if one is not known.
    """
    names, accepted = default if given is None else [name.strip() for name in given.split(",")], list(known)
    for name in names:
        if name not in accepted:
            raise SettingsError(f"--{flag} is {given!r}: choose of {', '.join(accepted)}")
    return list(dict.fromkeys(names))


def _write(answer: Answer, named: str | None) -> None:
    from fedprompt_mpi.forecast.figure import NAME, plot_forecast

    if not answer.question.is_cluster:
        return
    directory = make_output_directory(named, NAME)
    write_json(directory / f"{NAME}.json", to_json(answer))
    plot_forecast(answer, directory.joinpath)
    print(f"\nfigure: {directory / NAME}.png")

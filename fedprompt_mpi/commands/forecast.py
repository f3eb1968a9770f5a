"""The command forecast: what a federation would cost elsewhere, from measured runs and results of bench."""

import json
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import write_json
from fedprompt_mpi.forecast.answer import Answer, Question
from fedprompt_mpi.forecast.lines import format_answer, to_json
from fedprompt_mpi.forecast.network import Network, presets, read_network
from fedprompt_mpi.forecast.score import format_scores, score_run
from fedprompt_mpi.forecast.sources import Measured, read_sources
from fedprompt_mpi.forecast.speeds import read_speeds
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.directory import make_directory

MOST_CLIENTS, MOST_RANKS = 10_000_000, 100_000


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print the answer, and write it with its figure; or print how well a forecast did."""
    parser = command_parser("forecast", "what a federation would cost with other clients, nodes and networks")
    parser.add_argument("sources", nargs="+", help="run directories, and folders of bench.json")
    parser.add_argument("--clients", type=int, help="clients of a round; by default those of the first run")
    parser.add_argument("--nodes", type=int, help="by default those of the network, or of the sources")
    parser.add_argument("--ranks-per-node", type=int, help="by default those of the network, or of the sources")
    parser.add_argument("--network", help=f"a TOML file, or {', '.join(presets())}; by default as measured")
    parser.add_argument("--measured-on", help="the network on which the sources were measured, named alike")
    parser.add_argument("--method", default="", help="such as soft,lora; by default all measured ones")
    parser.add_argument("--collective", default="", help="gather, reduce or both; by default that of the runs")
    parser.add_argument("--wire", default="", help="formats of vectors; by default those of the runs")
    parser.add_argument("--rounds", type=int, help="of the whole run; by default as many as the sources have")
    parser.add_argument("--speeds", default="equal", help="lognormal:SIGMA, uniform:RATIO, a CSV file of rates, or run")
    parser.add_argument("--score", help="a run directory: compare its forecast with what it took")
    parser.add_argument("--json", action="store_true", help="print JSON alone, and write nothing")
    parser.add_argument("--dir", help="folder of forecast.json and the figure; by default runs/forecast-<time>")
    parsed = parse(parser, arguments)
    measured = read_sources(parsed.sources)
    network = read_network(parsed.network) if parsed.network else None
    measured_on = read_network(parsed.measured_on, "--measured-on") if parsed.measured_on else None
    if parsed.score is not None:
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
    nodes, ranks = first.place.nodes, first.place.ranks_per_node
    if network is not None and not network.mpi:
        if parsed.nodes is not None or parsed.ranks_per_node is not None:
            raise SettingsError(
                f"--network is {parsed.network!r}, which has no nodes of a cluster: leave their number out"
            )
        nodes, ranks = 1, 1
    elif network is not None and network.nodes is not None:
        ranks = network.ranks_per_node
        nodes = max(1, min(network.nodes, (clients + 1) // ranks))
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


def _number(given: int | None, flag: str, default: int, most: int) -> int:
    """Return the number of a flag, or the default.

    Raises:
        SettingsError: if it is out of bounds.
    """
    value = default if given is None else given
    if not 1 <= value <= most:
        raise SettingsError(f"--{flag} is {value}: give a number from 1 to {most:,}")
    return value


def _names(given: str, flag: str, default: list[str], known: Iterable[str]) -> list[str]:
    """Return the names of a flag, which are parted by commas.

    Raises:
        SettingsError: if one is not known.
    """
    names, accepted = [name.strip() for name in given.split(",") if name.strip()] or default, list(known)
    for name in names:
        if name not in accepted:
            raise SettingsError(f"--{flag} is {given!r}: choose of {', '.join(accepted)}")
    return list(dict.fromkeys(names))


def _write(answer: Answer, named: str | None) -> None:
    from fedprompt_mpi.forecast.figure import NAME, plot_forecast

    if not answer.network.mpi:
        return
    default = Path(f"runs/forecast-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        directory = make_directory(Path(named) if named else default, is_new=not named)
    except OSError as error:
        raise SettingsError(f"--dir is {str(named or default)!r}, which cannot be made ({error.strerror})") from error
    write_json(directory / f"{NAME}.json", to_json(answer))
    plot_forecast(answer, directory.joinpath)
    print(f"\nfigure: {directory / NAME}.png")

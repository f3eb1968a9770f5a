"""What was measured: collectives from bench.json, and collectives and the rest of a round from run directories."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.codec import make_codec
from fedprompt_mpi.comm.statistics import LEAST_SAMPLES, TimingRow, slowest_by_round
from fedprompt_mpi.comm.timing import TRANSFERS
from fedprompt_mpi.config import RunConfig, SettingsError, from_record
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.forecast.costs import Placement, Vector
from fedprompt_mpi.report.bench import FILE, read_bench
from fedprompt_mpi.report.run_data import RunData, read_run
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import reading

MOST_PARAMETERS, MOST_SECONDS = 1e13, 1e9
MEASURE = "mpirun -n N python -m fedprompt_mpi --comm.mode measure"
_ByRank = dict[int, dict[int, dict[str, float]]]
"""Round -> rank -> phase -> seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A measured collective."""

    source: str
    collective: str
    place: Placement
    vector: Vector
    library: str
    seconds: float
    """Median."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The measured rounds of a run; seconds are of each round, of the slowest rank where nothing else is said."""

    source: str
    config: RunConfig
    parameters: int
    place: Placement
    device: str
    """Of a worker, and its threads."""
    crowd: float
    """Workers that shared a core, or 1."""
    library: str
    total: list[float]
    """All phases of the slowest worker, which does one after the other; rank 0 aggregates while vectors arrive."""
    work: list[float]
    """Training of all ranks together."""
    train: list[float]
    unevenness: float
    """Deviation of the logarithm of the seconds that ranks take for the same work."""
    transfers: dict[str, list[float]]
    """Collective -> seconds."""
    wait: list[float]
    """Of rank 0 beyond the slowest rank's training and packing, and beyond what measuring adds."""
    pack: list[float]
    aggregate: list[float]
    evaluate: list[float]
    """Of the rank that began last, since others wait for it there; 0 of a round that was not evaluated."""
    evaluated: int
    """Texts that are scored at a time, with the triggered ones."""
    checkpoint: float
    """Of rank 0, each."""
    examples: list[int]
    """Of each client."""
    memory: int
    """Peak of rank 0, in bytes."""

    @property
    def method(self) -> str:
        """What is trained."""
        return self.config.prompt.method

    @property
    def collective(self) -> str:
        """How updates were collected."""
        return self.config.comm.collective

    @property
    def wire(self) -> str:
        """The format of vectors."""
        return self.config.comm.wire

    @property
    def vector(self) -> Vector:
        """What travelled."""
        return self.as_wire(self.wire)

    def as_wire(self, wire: str) -> Vector:
        """Return the run's vector in some format."""
        codec = make_codec(dataclasses.replace(self.config.comm, wire=wire, collective="gather"))
        return Vector(self.parameters, codec.bytes_of(self.parameters))

    def asked(self, collective: str, wire: str) -> RunConfig:
        """Return the run's settings with another collective and format.

        Raises:
            SettingsError: if they do not go together.
        """
        comm = dataclasses.replace(self.config.comm, collective=collective, wire=wire)
        with registry.let_strangers_pass():
            return dataclasses.replace(self.config, comm=comm)

    @property
    def times(self) -> list[float]:
        """What each client has to do, in examples of a round: as many as it has, or the same number for all."""
        if self.config.client.epochs is None:
            return [1.0] * len(self.examples)
        return [float(count) for count in self.examples]

    @property
    def work_of_a_client(self) -> tuple[Any, ...]:
        """What decides how long a client, and the server for it, work."""
        return self.config.client, self.config.model, self.config.prompt, self.config.federation.aggregator

    @property
    def client_s(self) -> float:
        """Seconds of a core, or GPU, for a client: the median over rounds."""
        return statistics.median(self.work) / self.place.clients / self.crowd

    @property
    def round(self) -> float:
        """Seconds of a round, in the mean over those that are evaluated and those that are not."""
        others = [whole - own for whole, own in zip(self.total, self.evaluate, strict=True)]
        return statistics.median(others) + self.evaluation / self.config.output.evaluate_every

    @property
    def evaluation(self) -> float:
        """Seconds of an evaluation; 0 if there was none."""
        return statistics.median([seconds for seconds in self.evaluate if seconds > 0] or [0.0])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that the sources hold."""

    transfers: list[Transfer]
    """Of benches; of rounds where there is no bench: in a round a collective takes longer."""
    runs: list[Rounds]

    @property
    def methods(self) -> list[str]:
        """The measured methods, in the order of the sources."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def run_of(self, method: str, collective: str = "", wire: str = "") -> Rounds:
        """Return the run of a method; of several one with that collective and wire, least crowded, with most clients.

        Raises:
            SettingsError: if the method was not measured, or on different devices.
        """
        runs = [run for run in self.runs if run.method == method]
        if not runs:
            known = f"the sources have {', '.join(self.methods)}" if self.runs else "no source is a run"
            raise SettingsError(
                f"--method is {method!r}, but {known}: run {MEASURE} --federation.rounds {LEAST_SAMPLES + 1} "
                f"--prompt.method {method} and name its directory"
            )
        devices = {run.device: run.source for run in runs}
        if len(devices) > 1:
            where = ", ".join(f"{source} on {device}" for device, source in devices.items())
            raise SettingsError(f"runs of {method} trained on different devices ({where}): name those of one device")
        return max(
            runs, key=lambda run: (run.collective == collective, run.wire == wire, -run.crowd, run.place.clients)
        )


def crowding(runs: Sequence[Rounds]) -> float:
    """Return by which share a core takes longer for a client for each further worker that it has.

    It follows from runs of one method with different numbers of workers on a core; 0 if there are none.
    """
    found = []
    for one, other in itertools.permutations(runs, 2):
        if one.method == other.method and one.device == other.device and one.crowd < other.crowd:
            ratio, first, second = other.client_s / one.client_s, one.crowd - 1, other.crowd - 1
            # (1 + c second) / (1 + c first) = ratio
            found.append(max(0.0, (ratio - 1) / max(second - ratio * first, 1e-9)))
    return min(1.0, statistics.median(found)) if found else 0.0


def read_sources(named: Sequence[str]) -> Measured:
    """Read run directories and results of bench.

    Raises:
        SettingsError: naming the source, what it lacks, and what to run; also if sources are of different models, or
            of different MPI libraries.
    """
    benches: list[Transfer] = []
    runs: list[Rounds] = []
    for path in dict.fromkeys(Path(name).resolve() for name in named):
        folder = path.parent if path.name == FILE else path
        if (folder / FILE).exists() and not RunPaths(folder).config.exists():
            benches += _transfers_of_bench(folder)
        else:
            runs.append(read_rounds_of(folder))
    several = [one for one in (*benches, *runs) if one.place.ranks > 1]
    _check_same("MPI library", {one.library.split("\n")[0].strip(): one.source for one in several})
    _check_same("model", {run.config.model.name: run.source for run in runs})
    for one, other in itertools.pairwise(sorted(runs, key=lambda run: run.method)):
        if one.method == other.method and one.work_of_a_client != other.work_of_a_client:
            raise SettingsError(
                f"{one.source} and {other.source} are of one method, {one.method}, but their clients do not do the "
                "same (sections client, model, prompt, or the rule): name runs that do"
            )
    of_rounds = [one for run in runs for one in transfers_of(run)]
    near, far = ([one for one in benches if (one.place.nodes > 1) is between] for between in (False, True))
    near = near or [one for one in of_rounds if one.place.nodes == 1]
    far = far or [one for one in of_rounds if one.place.nodes > 1]
    return Measured(transfers=near + far, runs=runs)


def _check_same(what: str, found: Mapping[str, str]) -> None:
    """Raise SettingsError if sources differ: value -> a source."""
    if len(found) > 1:
        where = ", ".join(f"{source} has {value[:60]}" for value, source in found.items())
        raise SettingsError(f"the sources are not of one {what} ({where}): name those of one")


def _placement(nodes: Sequence[int], clients: int, source: str) -> Placement:
    """Return the placement of ranks whose nodes are given, in order of the ranks.

    Raises:
        SettingsError: if ranks of a node do not follow one another.
    """
    if list(nodes) != sorted(nodes):
        raise SettingsError(
            f"{source} has ranks spread over its nodes in turn, and a forecast knows those of a node together: start "
            "it with the ranks of a node following one another"
        )
    return Placement(tuple(np.unique(np.asarray(nodes), return_counts=True)[1].tolist()), clients)


def _transfers_of_bench(folder: Path) -> list[Transfer]:
    bench, file = read_bench(folder), folder / FILE
    nodes = bench.rank_nodes
    if nodes is None:
        if not 0 < bench.nodes <= bench.ranks or bench.ranks % bench.nodes:
            raise SettingsError(
                f"{file} does not say where its {bench.ranks} ranks were, as of an earlier version: run bench again"
            )
        nodes = np.repeat(np.arange(bench.nodes), bench.ranks // bench.nodes).tolist()
    if len(nodes) != bench.ranks or bench.ranks < 2:
        raise SettingsError(f"{file} has {bench.ranks} ranks, and nodes of {len(nodes)}: run bench again")
    place = _placement(nodes, bench.ranks - 1, str(file))
    return [
        Transfer(source=str(folder), collective=row.collective, place=place, vector=Vector(row.bytes // 4, row.bytes),
                 library=bench.library, seconds=row.transfer.median)
        for row in bench.rows
        if row.bytes >= 4 and 0 < row.transfer.median < MOST_SECONDS and row.collective in TRANSFERS
    ]  # fmt: skip


def transfers_of(run: Rounds) -> list[Transfer]:
    """Return the collectives of a run's rounds, as their median."""
    return [
        Transfer(source=run.source, collective=name, place=run.place, vector=run.vector, library=run.library,
                 seconds=statistics.median(seconds))
        for name, seconds in run.transfers.items() if run.place.ranks > 1 and min(seconds) > 0
    ]  # fmt: skip


def read_rounds_of(directory: Path, least: int = LEAST_SAMPLES) -> Rounds:
    """Read the measured rounds of a run.

    Args:
        directory: of a finished run.
        least: measured rounds that it must have.

    Raises:
        SettingsError: if it is no run, not finished, not measured, or its rounds have parts that no forecast has.
    """
    run = read_run(directory)
    if run.summary is None or run.communication is None:
        raise SettingsError(f"{directory} is not finished: name a finished run")
    config = from_record(run.settings)
    ranks, warmup = run.environment.ranks, run.communication.warmup_rounds
    again = f"run {MEASURE} --federation.rounds {LEAST_SAMPLES + warmup}"
    if run.communication.mode != "measure" and len(ranks) > 1:
        raise SettingsError(
            f"{directory} was run with comm.mode {run.communication.mode}, where waiting and transfer are one: {again}"
        )
    _check_parts(run, config, directory)
    after = run.environment.resumed_after + warmup
    with reading(RunPaths(directory).timings):
        figures = {
            number: own for number, own in slowest_by_round(run.timings)
            if after < number < len(run.rounds) and own["train"] > 0
        }  # fmt: skip
    if len(figures) < max(1, least):
        raise SettingsError(f"{directory} has {len(figures)} measured rounds, and a forecast needs {least}: {again}")
    wrong = (
        not ranks or not run.summary.peak_rss_bytes or not 0 < run.summary.parameters < MOST_PARAMETERS or warmup < 0
    )
    by_rank = _by_rank(run.timings, figures)
    if wrong or any(0 not in own for own in by_rank.values()):
        raise SettingsError(f"{directory} lacks ranks, parameters or the timings of rank 0: {again}")
    return _rounds(run, config, figures, by_rank)


def _rounds(run: RunData, config: RunConfig, figures: Mapping[int, Mapping[str, float]], by_rank: _ByRank) -> Rounds:
    """Return what the measured rounds of a run show: round -> figure -> seconds of the slowest rank."""
    assert run.summary is not None
    each, ranks = [*figures.values()], run.environment.ranks
    clients = round(statistics.fmean(len(run.rounds[number].cohort) for number in figures))
    train = {
        number: {rank: own.get("train", 0.0) + own.get("copy", 0.0) for rank, own in all_ranks.items()}
        for number, all_ranks in by_rank.items()
    }
    split, alone, worker = run.partition.evaluation, len(ranks) == 1, ranks[-1]
    waits = [own["wait (rank 0)"] - own["train"] - own["pack"] - own["overhead"] for own in each]
    return Rounds(
        source=str(run.directory), config=config, parameters=run.summary.parameters,
        place=_placement([rank.node for rank in ranks], max(1, clients), str(run.directory)),
        device=f"{worker.device} ({worker.threads} thread{'s' if worker.threads > 1 else ''})", crowd=_crowd(run),
        library=run.environment.mpi.library, total=[_longest(all_ranks) for all_ranks in by_rank.values()],
        work=[sum(own.values()) / max(1, len(run.rounds[number].cohort)) * clients for number, own in train.items()],
        train=[own["train"] for own in each], unevenness=_unevenness(train, run, config),
        transfers={name: [own[name] for own in each] for name in TRANSFERS},
        wait=[0.0 if alone else max(0.0, wait) for wait in waits],
        pack=[own["pack"] for own in each], aggregate=[own["aggregate"] for own in each],
        evaluate=[min(own.get("evaluate", 0.0) for own in all_ranks.values()) for all_ranks in by_rank.values()],
        evaluated=0 if split is None else split.examples + split.triggered, checkpoint=_checkpoint(by_rank.values()),
        examples=[client.num_examples for client in run.partition.clients], memory=run.summary.peak_rss_bytes[0],
    )  # fmt: skip


def _check_parts(run: RunData, config: RunConfig, directory: Path) -> None:
    """Raise SettingsError if rounds of a run have parts that a forecast does not have."""
    rule = registry.aggregators.get(config.federation.aggregator)
    parts = {
        "privacy.secure_aggregation": config.privacy.secure_aggregation,
        "federation.dropout": config.federation.dropout > 0,
        "output.evaluate_clients": config.output.evaluate_clients,
        "output.backdoor_snr": config.output.backdoor_snr,
        "a server that trains": rule is not None and rule.trains_itself,
        "an example filter": run.filtered is not None,
        "an audit": any(phase == "audit" for _, _, phase, _, _ in run.timings),
        "a lost rank": any(record.lost_ranks for record in run.rounds),
    }
    found = [name for name, there in parts.items() if there]
    if found:
        raise SettingsError(f"{directory} has {found[0]}, whose time no forecast has: name a run without it")


def _by_rank(rows: Iterable[TimingRow], rounds: Iterable[int]) -> _ByRank:
    found: _ByRank = {number: {} for number in rounds}
    for number, rank, phase, seconds, _ in rows:
        if number in found:
            phases = found[number].setdefault(rank, {})
            phases[phase] = phases.get(phase, 0.0) + seconds
    return found


def _longest(ranks: Mapping[int, Mapping[str, float]]) -> float:
    """Return the seconds of a round: of the slowest worker, or of the only rank."""
    return max(sum(phases.values()) for rank, phases in ranks.items() if rank or len(ranks) == 1)


def _crowd(run: RunData) -> float:
    """Return how many workers' threads shared a core, on the node where most did; 1 if each had its own, or a GPU."""
    crowds = [1.0]
    workers = [rank for rank in run.environment.ranks[1:] if rank.device == "cpu"]
    for node in {rank.node for rank in workers}:
        own = [rank for rank in workers if rank.node == node]
        cores = set().union(*(set(_numbers(rank.cores)) for rank in own))
        if cores:
            crowds.append(sum(rank.threads for rank in own) / len(cores))
    return max(crowds)


def _numbers(cores: str) -> Iterator[int]:
    """Yield the cores of a list such as 0-3,8."""
    for part in cores.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            yield from range(int(first), min(int(last or first), int(first) + 4096) + 1)


def _unevenness(train: Mapping[int, Mapping[int, float]], run: RunData, config: RunConfig) -> float:
    """Return by how much ranks differ in the seconds of a client, or of an example if epochs are set."""
    home = home_ranks(run.clients, len(run.environment.ranks)).tolist()
    examples, variances = [client.num_examples for client in run.partition.clients], []
    for number, seconds in train.items():
        work: dict[int, float] = {}
        for client in run.rounds[number].cohort:
            work[home[client]] = work.get(home[client], 0) + (1 if config.client.epochs is None else examples[client])
        times = [np.log(seconds[rank] / own) for rank, own in work.items() if own > 0 and seconds.get(rank, 0) > 0]
        if len(times) > 1:
            variances.append(float(np.var(times, ddof=1)))
    return min(1.0, statistics.fmean(variances) ** 0.5) if variances else 0.0


def _checkpoint(rounds: Iterable[Mapping[int, Mapping[str, float]]]) -> float:
    """Return the seconds of rank 0 for a checkpoint."""
    found = [ranks[0]["checkpoint"] for ranks in rounds if "checkpoint" in ranks.get(0, {})]
    return statistics.median(found) if found else 0.0

"""A round from its parts: against what was put in, and by hand where that is short."""

import dataclasses
from typing import Any

import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.config import from_record
from fedprompt_mpi.forecast.costs import Placement, evenly
from fedprompt_mpi.forecast.estimate import Estimate
from fedprompt_mpi.forecast.links import fit_links
from fedprompt_mpi.forecast.model import Fitted, Forecast, Model, Scenario, left_after_overlap
from fedprompt_mpi.forecast.network import Contention, Network
from fedprompt_mpi.forecast.sources import Measured, Rounds
from fedprompt_mpi.forecast.sources import crowding as crowding_of
from fedprompt_mpi.forecast.speeds import Speeds

CLIENT_S, EVALUATE_S, AGGREGATE_S = 0.5, 0.3, 0.02
TEN_GBE = Network(name="n", latency_us=20, up_mbit=10_000, down_mbit=10_000, source="made up")


def rounds(place: Placement = evenly(1, 3, 10), **changes: Any) -> Rounds:  # noqa: B008 - it is frozen
    """Return ten measured rounds in which every client took as long; changes are of settings or of measurements."""
    sections = {name: changes.pop(name) for name in ("federation", "comm", "output", "client") if name in changes}
    config = from_record({"seed": 0, **sections})
    train = CLIENT_S * place.most_on_a_worker
    run = Rounds(
        source="made up", config=config, parameters=7680, place=place, device="cpu (1 thread)", crowd=1.0,
        library="MPICH", total=[train + EVALUATE_S + AGGREGATE_S] * 10, train=[train] * 10,
        work=[CLIENT_S * place.clients] * 10,
        unevenness=0.0, transfers={"broadcast": [1e-4] * 10, "gather": [2e-4] * 10, "reduce": [0.0] * 10},
        wait=[0.0] * 10, pack=[1e-3] * 10, aggregate=[AGGREGATE_S] * 10, evaluate=[EVALUATE_S] * 10, evaluated=100_000,
        checkpoint=0.01, examples=[100] * place.clients, memory=400_000_000,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def forecast(
    run: Rounds,
    place: Placement,
    network: Network = TEN_GBE,
    collective: str = "gather",
    crowding: float = 0.0,
    **changes: Any,
) -> Forecast:
    links = fit_links([], network, network)
    return Model(run, Fitted(links=links, here=links, crowding=crowding)).forecast(
        Scenario(place=place, collective=collective, **{"wire": "float32", **changes})
    )


def test_what_was_measured_is_forecast() -> None:
    run = rounds()
    found = forecast(run, run.place).phases
    assert found["train"].seconds == pytest.approx(run.train[0])
    assert found["evaluate"].seconds == pytest.approx(EVALUATE_S)
    assert found["aggregate"].seconds == pytest.approx(AGGREGATE_S)


def test_clients_go_in_waves_and_evaluation_is_shared() -> None:
    found = forecast(rounds(), evenly(64, 8, 10_000)).phases
    assert found["train"].seconds == pytest.approx(20 * CLIENT_S)
    assert found["evaluate"].seconds == pytest.approx(EVALUATE_S * 3 / 512, rel=0.2)  # whole batches


def test_nodes_that_are_one_machine_share_its_cores() -> None:
    shared = dataclasses.replace(TEN_GBE, contention=Contention(cores=2))
    found = forecast(rounds(), evenly(8, 1, 10), shared).phases
    assert found["train"].seconds == pytest.approx(10 * CLIENT_S / 2)
    assert found["evaluate"].seconds == pytest.approx(EVALUATE_S)
    alone = forecast(rounds(), evenly(8, 1, 10)).phases
    assert alone["train"].seconds == pytest.approx(2 * CLIENT_S)


def test_unequal_clients_are_waited_for() -> None:
    equal, unequal, without = (
        forecast(rounds(), evenly(11, 1, 10), speeds=Speeds(name), left_out=share).phases["train"].seconds
        for name, share in (("equal", 0.0), ("lognormal:0.5", 0.0), ("lognormal:0.5", 0.2))
    )
    assert unequal > 1.8 * equal and equal < without < unequal


@pytest.mark.parametrize(("rule", "power"), [("fedavg", 1), ("multi_krum", 2)])
def test_rules_that_compare_pairs_take_the_square(rule: str, power: int) -> None:
    run = rounds(federation={"aggregator": rule, "assumed_malicious": 1})
    found = forecast(run, evenly(1, 3, 100)).phases["aggregate"].seconds
    assert found == pytest.approx(AGGREGATE_S * 10**power, rel=1e-6)


def test_a_sum_along_the_tree_takes_as_long_for_any_number_of_clients() -> None:
    run = rounds(
        comm={"collective": "reduce"}, transfers={"broadcast": [1e-4] * 10, "gather": [0.0] * 10, "reduce": [1e-4] * 10}
    )
    few, many = (forecast(run, evenly(2, 3, clients), collective="reduce").phases for clients in (10, 1000))
    assert few["aggregate"].seconds == many["aggregate"].seconds == pytest.approx(AGGREGATE_S)
    assert many["pack"].seconds == pytest.approx(100 * few["pack"].seconds)
    unmeasured = forecast(rounds(), evenly(2, 3, 10), collective="reduce").phases["pack"]
    assert unmeasured.seconds == pytest.approx(1e-3 * 2 / 5 + 2 * AGGREGATE_S / 10)
    assert unmeasured.deviation > few["pack"].deviation


@pytest.mark.parametrize(
    ("work", "transfer", "chunks", "left"),
    [(4.0, 100.0, 1, 4.0), (4.0, 100.0, 4, 1.0), (4.0, 1.0, 4, 1.0 + 3 * 0.75), (0.0, 1.0, 3, 0.0)],
)
def test_a_chunk_is_aggregated_while_the_next_arrives(work: float, transfer: float, chunks: int, left: float) -> None:
    assert left_after_overlap(Estimate(work), Estimate(transfer), chunks).seconds == pytest.approx(left)


def test_memory_grows_by_buffers_and_no_more() -> None:
    few, many = (forecast(rounds(), evenly(64, 8, clients)).memory for clients in (1000, 50_000))
    assert many - few < 2 * 64 * 2**20 + 46 * 50_000
    pairs = forecast(rounds(federation={"aggregator": "multi_krum"}), evenly(64, 8, 50_000)).memory
    assert pairs - many > 8 * 50_000**2 - 1e9


def test_short_formats_keep_and_send_residuals() -> None:
    run = rounds(comm={"wire": "int8"})
    found = forecast(run, evenly(64, 8, 10_000), wire="int8")
    exact = forecast(rounds(), evenly(64, 8, 10_000))
    assert found.phases["checkpoint"].seconds > exact.phases["checkpoint"].seconds + 10_000 * 4 * 7680 * 8 / 1e10 * 0.9
    assert found.phases["pack"].seconds == pytest.approx(1000 * 1e-3)  # rank 0 unpacks all
    with pytest.raises(SettingsError, match="reduce"):
        run.asked("reduce", "int8")


def test_a_rank_scores_no_less_than_one_batch() -> None:
    run = rounds(evaluated=100)  # three batches of 4,096 tokens, if texts are as long as they may be
    found = forecast(run, evenly(64, 8, 10_000)).phases["evaluate"]
    assert found.seconds == pytest.approx(EVALUATE_S)


def test_workers_that_shared_a_core_were_slower_than_they_are_alone() -> None:
    found = forecast(rounds(crowd=2.0), evenly(1, 3, 10)).phases["train"]
    assert found.seconds == pytest.approx(5 * CLIENT_S / 2)


def test_crowded_cores_take_longer_for_a_client() -> None:
    alone = rounds()
    crowded = rounds(evenly(1, 7, 12), crowd=3.0, work=[12 * 3.0 * 1.3 * CLIENT_S] * 10)
    assert crowding_of([alone, crowded]) == pytest.approx(0.15)
    assert crowding_of([alone, alone]) == 0
    shared = dataclasses.replace(TEN_GBE, contention=Contention(cores=2))
    found = forecast(alone, evenly(8, 1, 10), shared, crowding=0.15).phases["train"]
    assert found.seconds == pytest.approx(5 * CLIENT_S * (1 + 0.15 * 2.5))


def test_fewer_updates_travel_if_some_are_not_waited_for() -> None:
    run, place = rounds(parameters=22_744_506), evenly(64, 8, 10_000)
    whole, part = (forecast(run, place, speeds=Speeds("uniform:3"), left_out=share) for share in (0.0, 0.2))
    assert part.bytes_up == pytest.approx(0.8 * whole.bytes_up, rel=0.01)
    assert part.phases["gather"].seconds < 0.82 * whole.phases["gather"].seconds
    assert part.waiting > 0 < whole.waiting


def test_one_process_sends_nothing() -> None:
    found = forecast(rounds(), evenly(1, 1, 10))
    assert found.phases["gather"].seconds == found.phases["wait"].seconds == found.bytes_total == 0
    assert found.phases["train"].seconds == pytest.approx(10 * CLIENT_S)


def test_runs_of_one_method_on_two_devices_are_not_mixed() -> None:
    cpu, gpu = rounds(), rounds(device="cuda:0 (1 thread)", source="gpu")
    with pytest.raises(SettingsError, match=r"different devices .*made up on cpu .*gpu on cuda"):
        Measured(transfers=[], runs=[cpu, gpu]).run_of("soft")

"""Cohorts, averages, rates and checkpoints, by hand and by their limits."""

from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.comm import chunks
from fedprompt_mpi.comm.codec import FLOAT32
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.config import FederationConfig, OutputConfig, PoisonConfig, RunConfig
from fedprompt_mpi.federation.cohort import Cohort, draw_cohort, home_ranks
from fedprompt_mpi.federation.evaluate import summarise
from fedprompt_mpi.federation.server import Aggregation, Server
from fedprompt_mpi.federation.updates import HEADER, LocalUpdates, gather
from fedprompt_mpi.rules import registry, spill


def test_homes_are_contiguous_and_even() -> None:
    np.testing.assert_array_equal(home_ranks(10, 3), [1] * 5 + [2] * 5)
    np.testing.assert_array_equal(home_ranks(10, 11), np.arange(1, 11))
    np.testing.assert_array_equal(home_ranks(7, 4), [1, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(home_ranks(4, 1), [0] * 4)


def _config(seed: int = 0, **federation: Any) -> RunConfig:
    return RunConfig(seed=seed, federation=FederationConfig(**federation))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_cohorts_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    config = _config(3, fraction=0.4)
    cohort = draw_cohort(config, size, round_=5)
    assert cohort.clients == draw_cohort(config, 1, round_=5).clients
    assert len(cohort.clients) == 4
    together = [client for rank in range(size) for client in cohort.of_rank(rank)]
    assert together == sorted(cohort.clients)
    assert cohort.counts.tolist() == [len(cohort.of_rank(rank)) for rank in range(size)]


def test_everybody_takes_part_at_fraction_one_and_somebody_always() -> None:
    assert draw_cohort(_config(clients=5), 1, 1).clients == (0, 1, 2, 3, 4)
    assert len(draw_cohort(_config(clients=5, fraction=0.01), 1, 1).clients) == 1
    drawn = {draw_cohort(_config(fraction=0.1), 1, t).clients for t in range(100)}
    assert len(drawn) == 10


def test_a_server_that_trains_comes_first_on_rank_0() -> None:
    config = _config(clients=4, aggregator="fltrust")
    assert draw_cohort(config, 3, 1).counts.tolist() == [1, 2, 2]
    assert draw_cohort(config, 1, 1).counts.tolist() == [5]
    assert draw_cohort(config, 1, 1).trainers(0) == [4, 0, 1, 2, 3]
    assert draw_cohort(config, 3, 1).trainers(0) == [4]
    assert draw_cohort(config, 3, 1).trainers(1) == [0, 1]


def _headers(num_examples: list[int], norms: list[float] | None = None) -> np.ndarray:
    headers = np.zeros(len(num_examples), dtype=HEADER)
    headers["client"] = np.arange(len(headers))
    headers["num_examples"] = num_examples
    headers["norm"] = 1.0 if norms is None else norms
    return headers


def _apply(server: Server, headers: np.ndarray, deltas: np.ndarray, round_: int = 1) -> Aggregation:
    channel = LocalChannel()
    cohort = Cohort(clients=tuple(range(len(headers))), ranks=(0,) * len(headers), size=1)
    updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=[])
    gathered = gather(channel, updates, FLOAT32, server.judge)
    aggregation = server.apply(gathered, channel.phases, round_)
    if aggregation.aggregated:  # all chunks were asked for, as every rank must
        assert next(gathered.chunks, None) is None
    return aggregation


def test_the_server_weights_by_examples() -> None:
    server = Server(np.array([10.0, 20.0], dtype=np.float32), RunConfig(), is_root=True)
    aggregation = _apply(server, _headers([1, 3]), np.array([[4.0, 0.0], [0.0, 4.0]], dtype=np.float32))
    np.testing.assert_array_equal(server.vector, [11.0, 23.0])
    assert aggregation.dropped == []
    np.testing.assert_array_equal(aggregation.weights, [0.25, 0.75])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("aggregator", registry.aggregators)
def test_what_is_not_finite_never_enters(aggregator: str, bad: float) -> None:
    """With every rule the result is that of the others alone, and f stays as it is: the dropped one may be honest."""
    deltas = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    deltas[4, 2] = bad
    norms = np.linalg.norm(deltas, axis=1)
    others = np.delete(np.arange(9), 4)
    results = []
    for rows in (np.arange(9), others):
        headers = _headers([1] * 9, norms.tolist())[rows]
        if aggregator == "fltrust":
            headers["client"] = [9, *headers["client"][1:]]
        config = _config(clients=9, aggregator=aggregator, flame_noise=0.0)
        server = Server(np.ones(6, dtype=np.float32), config, is_root=True)
        aggregation = _apply(server, headers, deltas[rows])
        assert aggregation.dropped == ([4] if len(rows) == 9 else [])
        if len(rows) == 9 and aggregation.weights is not None:
            assert aggregation.weights[4] == 0
        results.append(server.vector)
    assert np.isfinite(results[0]).all()
    assert np.abs(results[0] - 1).max() > 0
    np.testing.assert_array_equal(results[0], results[1])


def test_an_honest_client_that_diverges_does_not_weaken_the_rule() -> None:
    """Two attackers beside it are still assumed: of the other six, two are trimmed on each side."""
    deltas = np.array([[np.nan], [1], [2], [3], [4], [-1e6], [-1e6]], dtype=np.float32)
    config = _config(clients=7, aggregator="trimmed_mean", assumed_malicious=2)
    server = Server(np.zeros(1, dtype=np.float32), config, is_root=True)
    _apply(server, _headers([1] * 7, np.abs(deltas[:, 0]).tolist()), deltas)
    assert server.vector[0] == 1.5


def test_f_gives_way_where_too_few_are_left() -> None:
    """Krum assumes 2 of 7; of the 5 that are left it can assume 1, and continues."""
    deltas = np.array([[np.nan], [np.inf], [0], [1], [2], [3], [90]], dtype=np.float32)
    config = _config(clients=7, aggregator="krum", assumed_malicious=2)
    server = Server(np.zeros(1, dtype=np.float32), config, is_root=True)
    assert _apply(server, _headers([1] * 7, np.abs(deltas[:, 0]).tolist()), deltas).aggregated
    assert server.vector[0] in (1, 2)


def test_a_norm_without_bounds_is_as_good_as_infinite() -> None:
    """Its square would overflow a rule's memory, or the sum the vector."""
    deltas = np.array([[1.0], [2e38]], dtype=np.float32)
    server = Server(np.zeros(1, dtype=np.float32), RunConfig(), is_root=True)
    assert _apply(server, _headers([1, 1], [1.0, 2e38]), deltas).dropped == [1]
    assert server.vector[0] == 1


def test_fltrust_without_its_server_keeps_the_vector() -> None:
    """The server is no client, and is not reported as one."""
    headers = _headers([1] * 4, [np.nan, 1, np.inf, 1])
    headers["client"] = [3, 0, 1, 2]
    server = Server(np.ones(2, dtype=np.float32), _config(clients=3, aggregator="fltrust"), is_root=True)
    aggregation = _apply(server, headers, np.ones((4, 2), dtype=np.float32))
    assert aggregation.dropped == [1]
    assert not aggregation.aggregated
    np.testing.assert_array_equal(server.vector, 1.0)


@pytest.mark.parametrize(("norms", "expected"), [((1.0, 1.0, 1.0), True), ((np.nan, 1.0, 1.0), False)])
def test_every_rank_knows_whether_the_vector_has_moved(norms: tuple[float, ...], expected: bool) -> None:
    """Also a worker, which holds no updates of others; too few are left for krum without one of three."""
    config = _config(clients=3, aggregator="krum", assumed_malicious=0)
    for is_root in (True, False):
        server = Server(np.zeros(2, dtype=np.float32), config, is_root=is_root)
        assert _apply(server, _headers([1] * 3, list(norms)), np.ones((3, 2), np.float32)).aggregated is expected


def test_a_run_ends_only_if_every_honest_client_diverged() -> None:
    headers = _headers([1] * 3, [np.nan, np.nan, 1.0])
    attacked = RunConfig(poison=PoisonConfig(clients=[0, 1], attack="nan"))

    def diverged(config: RunConfig, some: np.ndarray) -> bool:
        return Server(np.zeros(1, dtype=np.float32), config, is_root=True).judge(some).diverged

    assert not diverged(RunConfig(), headers)
    assert not diverged(attacked, headers[:2])  # nobody honest is here
    assert not diverged(attacked, headers[:0])
    assert diverged(RunConfig(), headers[:2])


def test_a_loss_that_is_not_finite_is_left_out_too() -> None:
    headers = _headers([1, 1])
    headers["loss"][0] = np.nan
    server = Server(np.zeros(1, dtype=np.float32), RunConfig(), is_root=True)
    assert _apply(server, headers, np.array([[5.0], [7.0]], dtype=np.float32)).dropped == [0]
    assert server.vector[0] == 7


def test_too_few_finite_updates_leave_the_vector() -> None:
    """Krum needs 3 even if it assumes nobody malicious; two are left."""
    server = Server(np.ones(2, dtype=np.float32), _config(clients=5, aggregator="krum"), is_root=True)
    headers = _headers([1] * 5, [1, np.nan, 1, np.inf, np.nan])
    aggregation = _apply(server, headers, np.ones((5, 2), dtype=np.float32))
    assert aggregation.dropped == [1, 3, 4]
    assert not aggregation.aggregated
    assert aggregation.weights is None
    np.testing.assert_array_equal(server.vector, 1.0)


def test_noise_after_aggregation() -> None:
    """It has its standard deviation, is the same in every run, and another in every round."""
    moved = []
    for round_ in (1, 1, 2):
        server = Server(np.zeros(40_000, dtype=np.float32), _config(noise_std=0.5), is_root=True)
        _apply(server, _headers([1]), np.ones((1, 40_000), dtype=np.float32), round_)
        moved.append(server.vector)
    assert moved[0].mean() == pytest.approx(1.0, abs=0.02)
    assert moved[0].std() == pytest.approx(0.5, rel=0.02)
    np.testing.assert_array_equal(moved[0], moved[1])
    assert np.abs(moved[0] - moved[2]).max() > 1


def _two_steps(name: str, **settings: Any) -> list[float]:
    """Return where the server's optimiser takes 0, given the aggregated deltas 2 and then -1."""
    config = _config(server_optimizer=name, **settings)
    server = Server(np.zeros(1, dtype=np.float32), config, is_root=True)
    where = []
    for delta in (2.0, -1.0):
        _apply(server, _headers([1]), np.array([[delta]], dtype=np.float32))
        where.append(float(server.vector[0]))
    return where


def test_server_optimizers_by_hand() -> None:
    assert _two_steps("plain") == [2, 1]
    assert _two_steps("plain", server_lr=0.5) == [1, 0.5]
    assert _two_steps("momentum", server_momentum=0.5) == [2, 2]  # v = 2, then 0.5 * 2 - 1 = 0
    assert _two_steps("momentum", server_momentum=0.0) == [2, 1]
    common = {"server_beta2": 0.75, "server_tau": 1.0}
    # v = 0.75 * 1 + 0.25 * 4 = 1.75, then 0.75 * 1.75 + 0.25 * 1 = 1.25^2; m = 1, then 0
    root = np.sqrt(1.75)
    assert _two_steps("adam", server_momentum=0.5, **common) == pytest.approx([1 / (root + 1)] * 2)
    plain_m = _two_steps("adam", server_momentum=0.0, **common)
    assert plain_m == pytest.approx([2 / (root + 1), 2 / (root + 1) - 1 / 2.25])
    # v = 1 - 0.25 * 4 * sign(1 - 4) = 2, then 2 - 0.25 * 1 * sign(2 - 1) = 1.75
    first = 2 / (np.sqrt(2.0) + 1)
    assert _two_steps("yogi", server_momentum=0.0, **common) == pytest.approx([first, first - 1 / (root + 1)])


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_a_restored_server_goes_on_alike(name: str) -> None:
    config = _config(server_optimizer=name, aggregator="foolsgold", clients=3)
    deltas = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
    whole = Server(np.zeros(5, dtype=np.float32), config, is_root=True)
    for some in deltas[:2]:
        _apply(whole, _headers([1] * 3), some)
    resumed = Server(whole.vector.copy(), config, is_root=True)
    resumed.restore({key: array.copy() for key, array in whole.state().items()})
    for server in (whole, resumed):
        for some in deltas[2:]:
            _apply(server, _headers([1] * 3), some)
    np.testing.assert_array_equal(whole.vector, resumed.vector)


@pytest.mark.parametrize("aggregator", registry.aggregators)
def test_pieces_from_a_file_give_the_same_bits(aggregator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates too large to keep in memory, and to travel at once."""
    deltas = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    headers = _headers([1] * 8, np.linalg.norm(deltas.astype(np.float64), axis=1).tolist())
    if aggregator == "fltrust":
        headers["client"] = [8, *headers["client"][1:]]
    results = []
    for most in (2**28, 0):
        monkeypatch.setattr(spill, "MOST_KEPT_BYTES", most)
        monkeypatch.setattr(spill, "MOST_BYTES_IN_MEMORY", most)
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 8 * 7)
        server = Server(np.zeros(50, dtype=np.float32), _config(clients=8, aggregator=aggregator), is_root=True)
        _apply(server, headers, deltas)
        results.append(server.vector)
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0]).max() > 0


def test_deltas_of_whole_models_may_leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(spill.zeros(3, 5)) is np.ndarray
    monkeypatch.setattr(spill, "MOST_BYTES_IN_MEMORY", 59)
    deltas = spill.zeros(3, 5)
    assert isinstance(deltas, np.memmap)
    deltas[1] = 7
    np.testing.assert_array_equal(deltas, [[0] * 5, [7] * 5, [0] * 5])


def test_rates_by_hand() -> None:
    """3 of class 0 right and 1 wrong, 2 of class 1 right and 2 wrong; 3 of 4 triggered ones hit class 1.

    Of the three of class 0 that were right, the trigger turns two.
    """
    labels, aimed = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.arange(4)
    answers, triggered = [0, 0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 1]
    poison = RunConfig(poison=PoisonConfig(target=1, trigger="cf"), output=OutputConfig(metrics=["balanced_accuracy"]))
    result = summarise(np.array([*answers, *triggered, 4.0]), labels, aimed, 2, poison)
    assert result.accuracy == 5 / 8
    assert result.loss == 0.5
    assert result.macro_f1 == pytest.approx((6 / 9 + 4 / 7) / 2)
    assert result.answers == [5, 3]
    assert result.attack_success_rate == 3 / 4
    assert result.flip_rate == 2 / 3
    assert result.metrics == {"balanced_accuracy": (3 / 4 + 2 / 4) / 2}
    natural = RunConfig(poison=PoisonConfig(target=1, kind="natural", trigger="cf"))
    assert summarise(np.array([*answers, *triggered, 4.0]), labels, aimed, 2, natural).flip_rate is None
    clean = summarise(np.array([*answers, np.nan]), labels, aimed[:0], 2, poison)
    assert (clean.attack_success_rate, clean.flip_rate, clean.loss) == (None, None, None)

"""Cohorts, averages, rates and checkpoints, by hand and by their limits."""

from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.comm.channel import HEADER, LocalChannel
from fedprompt_mpi.config import ClientConfig, OutputConfig, RunConfig, SettingsError
from fedprompt_mpi.federation import local
from fedprompt_mpi.federation.aggregate import FedAvg
from fedprompt_mpi.federation.checkpoint import CHECKPOINT, Checkpoint, load_checkpoint, save_checkpoint
from fedprompt_mpi.federation.cohort import draw_cohort, home_ranks
from fedprompt_mpi.federation.evaluate import summarise
from fedprompt_mpi.federation.server import Server


def test_homes_are_contiguous_and_even() -> None:
    np.testing.assert_array_equal(home_ranks(10, 3), [1] * 5 + [2] * 5)
    np.testing.assert_array_equal(home_ranks(10, 11), np.arange(1, 11))
    np.testing.assert_array_equal(home_ranks(7, 4), [1, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(home_ranks(4, 1), [0] * 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_cohorts_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    cohort = draw_cohort(10, 0.4, size, seed=3, round_=5)
    assert cohort.clients == draw_cohort(10, 0.4, 1, seed=3, round_=5).clients
    assert len(cohort.clients) == 4
    together = [client for rank in range(size) for client in cohort.of_rank(rank)]
    assert together == sorted(cohort.clients)
    assert cohort.counts.tolist() == [len(cohort.of_rank(rank)) for rank in range(size)]


def test_everybody_takes_part_at_fraction_one_and_somebody_always() -> None:
    assert draw_cohort(5, 1.0, 1, 0, 1).clients == (0, 1, 2, 3, 4)
    assert len(draw_cohort(5, 0.01, 1, 0, 1).clients) == 1
    drawn = {draw_cohort(10, 0.1, 1, 0, t).clients for t in range(100)}
    assert len(drawn) == 10


def test_fedavg_by_hand() -> None:
    deltas = np.array([[1.0, -2.0], [5.0, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(FedAvg()(deltas, np.array([3.0, 1.0])), [2.0, -1.0])
    np.testing.assert_array_equal(FedAvg()(deltas[:1], np.array([7.0])), [1.0, -2.0])


def test_fedavg_sums_in_float64() -> None:
    """A thousand small deltas beside a large one are not lost, as they would be in float32."""
    deltas = np.full((1001, 1), 1e-4, dtype=np.float32)
    deltas[0] = 1e4
    expected = (1e4 + 1000 * float(np.float32(1e-4))) / 1001
    assert FedAvg()(deltas, np.ones(1001))[0] == pytest.approx(expected, rel=1e-12)


def test_deltas_of_whole_models_may_leave_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(local.room_for(3, 5)) is np.ndarray
    monkeypatch.setattr(local, "MOST_DELTA_BYTES_IN_MEMORY", 59)
    deltas = local.room_for(3, 5)
    assert isinstance(deltas, np.memmap)
    deltas[1] = 7
    np.testing.assert_array_equal(deltas, [[0] * 5, [7] * 5, [0] * 5])


def test_the_server_weights_by_examples() -> None:
    headers = np.zeros(2, dtype=HEADER)
    headers["num_examples"] = [1, 3]
    server = Server(np.array([10.0, 20.0], dtype=np.float32), FedAvg())
    deltas = np.array([[4.0, 0.0], [0.0, 4.0]], dtype=np.float32)
    channel = LocalChannel()
    server.apply(channel.gather(headers, deltas, np.array([2])), channel.timing, is_root=True)
    assert channel.timing.seconds("aggregate", 0) > 0
    np.testing.assert_array_equal(server.vector, [11.0, 23.0])


def test_rates_by_hand() -> None:
    """3 of class 0 right and 1 wrong, 2 of class 1 right and 2 wrong; 5 of 8 triggered ones hit class 1."""
    clean = np.array([3, 1, 2, 2, 4.0])
    triggered = np.array([0, 0, 3, 5, 0.0])
    result = summarise(clean, triggered, 2, target=1)
    assert result.accuracy == 5 / 8
    assert result.loss == 0.5
    assert result.macro_f1 == pytest.approx((6 / 9 + 4 / 7) / 2)
    assert result.attack_success_rate == 5 / 8
    assert summarise(clean, np.zeros(5), 2, target=1).attack_success_rate is None


def test_checkpoints(tmp_path: Path) -> None:
    config = RunConfig(output=OutputConfig(dir=str(tmp_path)))
    saved = Checkpoint(vector=np.arange(5, dtype=np.float32), round_=3, record={"round": 3})
    save_checkpoint(tmp_path, saved, config)
    loaded = load_checkpoint(tmp_path, config)
    np.testing.assert_array_equal(loaded.vector, saved.vector)
    assert (loaded.round_, loaded.record) == (3, {"round": 3})
    with pytest.raises(SettingsError, match="client = "):
        load_checkpoint(tmp_path, RunConfig(client=ClientConfig(lr=0.2)))
    content = bytearray((tmp_path / CHECKPOINT).read_bytes())
    content[-2] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(SettingsError, match="damaged"):
        load_checkpoint(tmp_path, config)
    (tmp_path / CHECKPOINT).write_bytes(content[:20])
    with pytest.raises(SettingsError, match="cannot be read"):
        load_checkpoint(tmp_path, config)

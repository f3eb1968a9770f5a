"""Error feedback: what is sent adds up to what was meant; and pieces are worked on while the next one comes."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from fedprompt_mpi.comm.codec import Int8
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.federation.feedback import RESIDUALS, ClientFeedback, send_with_feedback
from fedprompt_mpi.federation.overlap import overlapped
from fedprompt_mpi.rules import registry


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_nothing_is_lost_over_the_rounds(wire: str) -> None:
    rng = np.random.default_rng(0)
    residual, meant, sent = np.zeros(1000, dtype=np.float32), np.zeros(1000), np.zeros(1000)
    for _ in range(50):
        values = rng.standard_normal(1000).astype(np.float32)
        meant += values
        send_with_feedback(values, residual, registry.wire_formats[wire]())
        np.testing.assert_array_equal(registry.wire_formats[wire]().quantise(values), values)  # on the grid
        sent += values
    assert np.abs(meant - sent).max() < 0.05  # one step of int8, whatever the number of rounds
    np.testing.assert_allclose(meant - sent, residual, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_will_be_dropped_leaves_the_residual_alone(bad: float) -> None:
    feedback = ClientFeedback(Int8(), 2, 300, LocalChannel())
    first = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    feedback.send(1, first)
    feedback.note([1])
    before = feedback.collect()[RESIDUALS].copy()
    values = np.full(300, bad, dtype=np.float32)
    feedback.send(1, values)
    feedback.note([1])
    np.testing.assert_array_equal(values, np.full(300, bad, dtype=np.float32))
    np.testing.assert_array_equal(feedback.collect()[RESIDUALS], before)
    assert before[1].any()
    assert not before[0].any()


def test_the_server_s_own_update_leaves_nothing_behind() -> None:
    """FLTrust's comes as the client beyond the last; a checkpoint has no place for it."""
    feedback = ClientFeedback(Int8(), 2, 300, LocalChannel())
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    expected = Int8().quantise(values)
    feedback.send(2, values)
    feedback.note([0, 1])
    np.testing.assert_array_equal(values, expected)
    assert not feedback.collect()[RESIDUALS].any()


def test_the_next_piece_comes_while_one_is_worked_on() -> None:
    """The work on the first piece waits until the second has been asked for: one after the other would hang."""
    second_asked, done = threading.Event(), []

    def pieces() -> Iterator[tuple[slice, int]]:
        for number in range(3):
            if number == 1:
                second_asked.set()
            yield slice(number, number + 1), number

    def work(piece: slice, block: int) -> None:
        assert second_asked.wait(timeout=10)
        done.append((piece.start, block))

    overlapped(pieces(), 3, work)
    assert done == [(0, 0), (1, 1), (2, 2)]


def test_an_error_in_the_work_is_raised() -> None:
    def work(piece: slice, block: int) -> None:
        raise ValueError(f"piece {block}")

    with pytest.raises(ValueError, match="piece 0"):
        overlapped(iter([(slice(0, 1), 0), (slice(1, 2), 1)]), 2, work)

"""The seconds of a round are settled at the end of a run, when the timings of all ranks are there."""

from fedprompt_mpi.comm.statistics import slowest_by_round
from fedprompt_mpi.rundir.journal import settled
from fedprompt_mpi.rundir.records import RoundRecord, Seconds


def test_no_part_of_a_round_takes_longer_than_the_round() -> None:
    """Each part is that of its slowest rank: rank 1 evaluates for longer than the whole round took on rank 0."""
    rows = [
        (1, 0, "wait", 0.1, 0), (1, 0, "gather", 0.02, 8), (1, 0, "evaluate", 0.2, 0),
        (1, 1, "train", 0.1, 0), (1, 1, "gather", 0.01, 8), (1, 1, "evaluate", 0.364, 0),
    ]  # fmt: skip
    record = RoundRecord(round=1, seconds=Seconds(train=0.1, evaluate=0.2, total=0.348))
    seconds = settled(record, dict(slowest_by_round(rows))[1]).seconds
    assert seconds == Seconds(train=0.1, wait=0.1, transfer=0.02, aggregate=0.0, evaluate=0.364, total=0.474)
    assert seconds.total >= max(seconds.train, seconds.wait, seconds.transfer, seconds.evaluate)


def test_a_round_without_timings_keeps_its_seconds() -> None:
    record = RoundRecord(round=1, seconds=Seconds(total=0.348))
    assert settled(record, None) == record

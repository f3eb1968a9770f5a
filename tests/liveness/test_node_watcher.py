"""The watchers of two nodes, each with processes of its own to watch over, on one machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt_mpi.liveness import node_watcher
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.node_watcher import LOST, OVER, TOKEN_BYTES, NodeTable, TableRow, neighbours

TOKEN = bytes(range(TOKEN_BYTES))
SOON_S = 2.0


class Node:
    """Two processes that sleep, each a rank, and a watcher."""

    def __init__(self, file: Path, first_rank: int, *flags: str) -> None:
        self.file = file
        NodeTable.create(file, 2, TOKEN)
        self.ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        self.table = NodeTable(file)
        for local, process in enumerate(self.ranks):
            self.table.write(local, TableRow(process.pid, first_rank + local, 7, time.monotonic(), "train"))
        handles = [os.pidfd_open(process.pid) for process in self.ranks]
        options = {"handles": handles, "survives": "survives" in flags, "one_node": False}
        self.watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", node_watcher.__file__, str(file), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=handles,
        )  # fmt: skip
        for handle in handles:
            os.close(handle)
        assert self.watcher.stdout is not None
        assert self.watcher.stdout.read() == ""

    def meet(self, *others: "Node") -> None:
        """Let the watcher begin."""
        assert self.watcher.stdin is not None
        self.watcher.stdin.write(json.dumps([["127.0.0.1", other.table.port] for other in others]))
        self.watcher.stdin.close()
        self.watcher.stdin = None

    def pids(self) -> list[int]:
        """Return what the table says of the processes."""
        return [self.table.read(local).pid for local in range(2)]

    def is_over(self) -> bool:
        """Wait a little until the table says that the processes which are left are to be ended."""
        until = time.monotonic() + SOON_S
        while any(pid > 0 for pid in self.pids()):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def have_ended(self, within_s: float) -> bool:
        """Wait so long for the ranks' end."""
        until = time.monotonic() + within_s
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < until:
            time.sleep(0.02)
        return all(rank.poll() is not None for rank in self.ranks)

    def processor_s(self) -> float:
        """Return the processor time that the watcher has taken."""
        fields = Path(f"/proc/{self.watcher.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def said(self) -> str:
        """End the ranks that are left, and return what the watcher has said."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        return self.watcher.communicate(timeout=10)[1]


@pytest.fixture
def nodes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    made = [Node(tmp_path / f"table{n}", 2 * n, *getattr(request, "param", ())) for n in range(2)]
    for node, other in zip(made, reversed(made), strict=True):
        node.meet(other)
    time.sleep(0.2)  # until they watch
    yield made
    for node in made:
        for process in (*node.ranks, node.watcher):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.communicate()


def test_a_killed_rank_is_named_and_the_job_ends(nodes: list[Node]) -> None:
    here, there = nodes
    here.ranks[1].send_signal(signal.SIGKILL)
    time.sleep(0.7 * node_watcher.END_WITHIN_S)
    assert max(here.processor_s(), there.processor_s()) < 0.3  # they do not answer each other's answers
    assert there.have_ended(node_watcher.END_WITHIN_S + SOON_S)  # there is no launcher that does it
    mine, theirs = here.said(), there.said()
    assert f"rank 1 on {socket.gethostname()} ended without a word" in mine
    assert "rank 0 in train of round 7" in mine
    assert theirs.startswith(f"fedprompt_mpi: last seen on {socket.gethostname()}: rank 2 in train of round 7")
    assert (mine + theirs).count("fedprompt_mpi:") == 2


def test_of_two_that_are_killed_at_once_one_is_named(nodes: list[Node]) -> None:
    """At least one: the watcher that hears of the other first assumes that the launcher has ended its own."""
    for node in nodes:
        node.watcher.send_signal(signal.SIGSTOP)
        node.ranks[0].send_signal(signal.SIGKILL)
    for node in nodes:
        node.watcher.send_signal(signal.SIGCONT)
    assert all(node.is_over() for node in nodes)
    said = [node.said() for node in nodes]
    assert any("ended without a word" in some for some in said)
    for some, rank in zip(said, (0, 2), strict=True):
        assert f"rank {rank} in train of round 7" in some


def test_after_a_rank_has_ended_the_job_nobody_has_anything_to_add(nodes: list[Node]) -> None:
    here, there = nodes
    program = (
        "import sys; from pathlib import Path\n"
        "from fedprompt_mpi.liveness.liveness import Liveness\n"
        "from fedprompt_mpi.liveness.node_watcher import NodeTable\n"
        "live = Liveness(rank=int(sys.argv[2]), size=4, ends_job=True)\n"
        "live.share(NodeTable(Path(sys.argv[1])), int(sys.argv[2]))\n"
        "live.fail('failed', 'boom')\n"
    )
    second = Liveness(rank=1)
    second.share(NodeTable(here.file), 1)
    assert not second.is_over()
    first = subprocess.run(
        [sys.executable, "-c", program, str(here.file), "0"], capture_output=True, text=True, timeout=20, check=False
    )
    assert first.returncode == 3
    assert first.stderr.startswith("fedprompt_mpi: rank 0 of 4 on ")
    assert second.is_over()
    assert not second.claim_report()
    assert there.is_over()
    there.table.set_pid(1, there.ranks[1].pid)  # a rank that was about to write
    there.ranks[0].send_signal(signal.SIGKILL)  # as the launcher does, sooner or later
    assert there.is_over()
    assert there.said() == ""


@pytest.mark.parametrize("nodes", [("survives",)], indirect=True)
def test_where_the_others_go_on_they_are_let_be(nodes: list[Node]) -> None:
    here, there = nodes
    here.ranks[0].send_signal(signal.SIGKILL)
    assert not there.is_over()
    assert there.pids() == [rank.pid for rank in there.ranks]
    assert "rank 0 on " in here.said()
    assert "rank 0" not in there.said()


def test_a_message_of_another_job_is_not_heard(nodes: list[Node]) -> None:
    here, _ = nodes
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for message in (bytes(TOKEN_BYTES) + OVER, bytes(TOKEN_BYTES) + LOST, OVER, b""):
            out.sendto(message, ("127.0.0.1", here.table.port))
        time.sleep(0.5)
        assert here.pids() == [rank.pid for rank in here.ranks]
        out.sendto(TOKEN + OVER, ("127.0.0.1", here.table.port))
        time.sleep(0.5)
    assert here.pids() == [-rank.pid for rank in here.ranks]


def test_only_one_rank_of_a_node_reports(tmp_path: Path) -> None:
    """The first that asks, as long as its process lives."""
    NodeTable.create(tmp_path / "table", 2, TOKEN)
    claim = (
        "import sys, time; from pathlib import Path\n"
        "from fedprompt_mpi.liveness.node_watcher import NodeTable\n"
        "print(NodeTable(Path(sys.argv[1])).claim_report(), flush=True); time.sleep(30)\n"
    )
    command = [sys.executable, "-c", claim, str(tmp_path / "table")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert sorted(rank.stdout.readline() for rank in ranks if rank.stdout) == ["False\n", "False\n", "True\n"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("nodes_of_job", [1, 2, 3, 5, 8, 100])
def test_every_watcher_is_reached_over_few_links(nodes_of_job: int) -> None:
    """A message is passed on from node to node; without any one node it still reaches all others."""
    for down in [None, *range(nodes_of_job)]:
        alive = set(range(nodes_of_job)) - {down}
        reached, new = set(), {min(alive, default=0)}
        while new:
            reached |= new
            new = {n for node in new for n in neighbours(node, nodes_of_job) if n in alive} - reached
        if nodes_of_job & (nodes_of_job - 1) == 0 or down is None:
            assert reached >= alive
    assert max(len(neighbours(node, nodes_of_job)) for node in range(nodes_of_job)) <= 7

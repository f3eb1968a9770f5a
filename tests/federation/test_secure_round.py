"""Secure aggregation in a run: the bits of the plain run, who is missing, and rounds that are given up."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi import RunConfig, SettingsError, load_prompt
from fedprompt_mpi.comm.codec import FLOAT32
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.config import FederationConfig
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.secure_round import CHECKS, KEYS, REVEALED, SHARES, SecureRound
from fedprompt_mpi.federation.server import Server
from fedprompt_mpi.federation.updates import HEADER, PUBLIC_HEADER, LocalUpdates, gather
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.timings import read_timings
from tests.jobs import find_mpirun, read_rounds, run_here, run_program

RULES = {
    "fedavg": ("--federation.update_bound=50",),
    "equal weights": ("--federation.update_bound=5", "--federation.weighting=equal", "--federation.partition=quantity"),
    "norm_clip": ("--federation.aggregator=norm_clip", "--federation.clip_norm=3", "--federation.noise_std=0.001"),
    "dp_fedavg": ("--privacy.mechanism=dp_fedavg", "--privacy.clip_norm=3", "--federation.fraction=0.8",
                  "--privacy.threshold=3"),
    "momentum": ("--federation.update_bound=50", "--federation.server_optimizer=momentum", "--privacy.mechanism=ldp"),
    "lora": ("--federation.update_bound=0.5", "--prompt.method=lora", "--client.lr=0.003"),
}  # fmt: skip
SECURE, DROPOUT = "--privacy.secure_aggregation=true", "--federation.dropout=0.2"


def _vector(directory: Path) -> bytes:
    return load_prompt(directory).vector.tobytes()


def _plain(flags: tuple[str, ...]) -> list[str]:
    return [flag for flag in flags if "threshold" not in flag]


@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_as_the_plain_run(rule: str, tmp_path: Path) -> None:
    """By gather and by reduce, with clients that vanish; and rank 0 keeps neither a loss nor a norm of a client."""
    flags, vectors = RULES[rule], set()
    for collective, secure in itertools.product(("gather", "reduce"), (False, True)):
        directory = tmp_path / f"{collective}-{secure}"
        own = [*flags, SECURE] if secure else _plain(flags)
        run_here(directory, *own, DROPOUT, f"--comm.collective={collective}")
        vectors.add(_vector(directory))
        for record in read_rounds(directory)[1:]:
            assert record["given_up"] is None and record["aggregated"]
            assert (record["train_loss"] is None) == secure
            assert all((norm is None) == secure for norm in record["update_norms"])
            shares = dict(zip(record["cohort"], record["shares"], strict=True))
            assert all((shares[client] == 0) == (client in record["vanished"]) for client in shares)
    assert len(vectors) == 1
    assert any(record["vanished"] for record in read_rounds(tmp_path / "gather-True"))


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun")
@pytest.mark.parametrize(("ranks", "collective"), [(3, "gather"), (5, "reduce")])
def test_the_same_bits_on_any_number_of_ranks(ranks: int, collective: str, tmp_path: Path) -> None:
    flags = (*RULES["fedavg"], SECURE, DROPOUT, "--client.batched=1")
    finished = run_program(ranks, tmp_path / "ranks", *flags, f"--comm.collective={collective}")
    assert finished.status == 0, finished
    run_here(tmp_path / "one", *flags)
    assert _vector(tmp_path / "ranks") == _vector(tmp_path / "one")
    rows = [row for row in read_timings(RunPaths(tmp_path / "ranks")) if row[0] == 2]
    for phase in ("keys", "shares", "unmask"):
        assert {rank for _, rank, name, _, size in rows if name == phase and size} >= set(range(1, ranks))
    assert {rank for _, rank, name, _, _ in rows if name == "mask"} == set(range(ranks))
    traffic = read_rounds(tmp_path / "ranks")[2]["traffic"]["secure"]
    assert traffic["bytes"] > 10 * 9 * SHARES.itemsize and traffic["wire_bytes"] == 0


@pytest.mark.parametrize("rule", ["fedavg", "median", "norm_clip", "multi_krum"])
def test_dropout_in_a_plain_run_is_the_rule_of_those_who_came(rule: str) -> None:
    """By gather: the rest's result, as if the others had never been in the round."""
    rng = np.random.default_rng(0)
    deltas = rng.standard_normal((8, 6)).astype(np.float32)
    config = RunConfig(federation=FederationConfig(clients=8, aggregator=rule))
    results = []
    for clients, vanished in (((0, 1, 2, 3, 4, 5, 6, 7), (2, 5)), ((0, 1, 3, 4, 6, 7), ())):
        headers = np.zeros(len(clients), dtype=HEADER)
        headers["client"], headers["num_examples"] = clients, [10 + client for client in clients]
        headers["norm"] = np.linalg.norm(deltas[list(clients)], axis=1)
        cohort = Cohort(clients=clients, ranks=(0,) * len(clients), size=1, vanished=vanished)
        updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas[list(clients)], own_rates=[])
        channel, server = LocalChannel(), Server(np.zeros(6, dtype=np.float32), config, is_root=True)
        aggregation = server.apply(gather(channel, updates, FLOAT32, server.judge), channel.phases, 1)
        assert aggregation.aggregated
        results.append(server.vector)
    np.testing.assert_allclose(results[0], results[1], atol=1e-8 if rule == "norm_clip" else 0)
    assert results[0].any()


def test_dropout_in_a_plain_run_sends_no_update(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "--federation.rounds=1", "--federation.dropout=0.3")
    (record,) = read_rounds(tmp_path / "run")[1:]
    come = 10 - len(record["vanished"])
    assert 0 < come < 10
    assert (record["bytes_up"], record["bytes_down"]) == (come * 10240, 10 * 10240)


def test_a_round_with_too_few_is_given_up_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(
        tmp_path / "run", *RULES["fedavg"], SECURE, "--federation.dropout=0.4", "--federation.rounds=5",
        "--privacy.threshold=8", "--output.checkpoint_every=5",
    )  # fmt: skip
    records = read_rounds(tmp_path / "run")[1:]
    given_up = [record for record in records if record["given_up"]]
    assert 0 < len(given_up) < len(records), [len(record["vanished"]) for record in records]
    said = capsys.readouterr().out
    for record in given_up:
        come = 10 - len(record["vanished"])
        assert come < 8
        assert record["given_up"] == f"{come} of 10 clients came, and 8 must be left"
        assert f"{record['given_up']}; prompt kept" in said
        assert not record["aggregated"] and record["shares"] is None and record["bytes_up"] == 0
    assert all(len(record["vanished"]) <= 2 for record in records if not record["given_up"])


def test_an_update_that_is_not_finite_does_not_come(tmp_path: Path) -> None:
    """The others' sum is that of the plain run, which drops the update by its header."""
    flags = (*RULES["fedavg"], "--poison.clients=[3]", "--poison.attack=nan")
    run_here(tmp_path / "plain", *flags)
    run_here(tmp_path / "secure", *flags, SECURE)
    assert _vector(tmp_path / "plain") == _vector(tmp_path / "secure")
    assert read_rounds(tmp_path / "plain")[1]["dropped"] == [3]
    assert read_rounds(tmp_path / "secure")[1]["dropped"] == [3]


def test_a_run_in_which_everybody_diverges_ends_as_a_plain_one(tmp_path: Path) -> None:
    diverging = ("--prompt.method=full", "--client.lr=1e14", "--client.optimizer=sgd")
    for name, flags in {"plain": (), "secure": (SECURE,)}.items():
        with pytest.raises(SettingsError, match="with which every client diverged in round 1"):
            run_here(tmp_path / name, *RULES["fedavg"], *flags, *diverging)


def test_the_header_has_nothing_of_the_update() -> None:
    assert PUBLIC_HEADER.names == ("client", "num_examples", "train_s", "asked_to_stop", "given_up")


Tamper = Callable[[bytearray], None]


def _flip(data: bytearray) -> None:
    data[-20] ^= 1


class TamperedChannel(LocalChannel):
    """Changes what rank 0 receives or deals, in round 2; a place in the data is that of an address."""

    def __init__(self, where: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.where = where

    def _is_due(self, where: str) -> bool:
        return self.where == where and self.phases.timing.round == 2

    def collect(self, data: bytes, phase: str | None = None) -> list[bytes]:
        changed = bytearray(data)
        if self._is_due(f"collect {phase}"):
            _flip(changed)
        if self._is_due(f"loses {phase}"):
            del changed[-{"shares": SHARES, "unmask": REVEALED}[str(phase)].itemsize :]
        if self._is_due(f"check {phase}"):
            changed[CHECKS.itemsize - 1] ^= 128
        if self._is_due(f"address {phase}"):
            changed[len(changed) - {"keys": KEYS, "shares": SHARES, "unmask": REVEALED}[str(phase)].itemsize + 1] ^= 1
        return [bytes(changed)]

    def deal(self, parts: list[bytes], phase: str) -> bytes:
        changed = bytearray(parts[0])
        if self._is_due(f"deal {phase}"):
            _flip(changed)
        if self._is_due(f"dealt address {phase}"):
            changed[1] ^= 1
        return bytes(changed)

    def gather(self, rows: Any, *arguments: Any) -> Iterator[tuple[slice, np.ndarray]]:  # pyright: ignore
        for chunk, words in super().gather(rows, *arguments):
            if self._is_due("gather"):
                words[4, 1000] ^= np.uint32(1 << 30)
            yield chunk, words


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("deal keys", "changed on its way|does not hold the key"),
        ("collect shares", "a share was changed on its way"),
        ("loses shares", "has received no share"),
        ("deal shares", "a share was changed on its way"),
        ("gather", "does not fit the check words"),
        ("check unmask", "does not fit the check words"),
        ("collect unmask", "do not belong together"),
        ("loses unmask", "shares are there"),
        ("address keys", "public keys were changed"),
        ("dealt address keys", "public keys were changed"),
        ("address shares", "has received no share"),
        ("dealt address shares", "has received no share"),
        ("address unmask", "shares are there"),
    ],
)
def test_what_is_changed_on_its_way_ends_the_round_and_not_the_run(
    where: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector stays what it was after the round before; the next round is aggregated again."""
    program = importlib.import_module("fedprompt_mpi.run")  # whose name in the package is the function
    monkeypatch.setattr(program, "open_channel", lambda launch, liveness, comm: TamperedChannel(where, liveness))
    run_here(tmp_path / "run", *RULES["fedavg"], SECURE, "--federation.rounds=3", "--privacy.threshold=10")
    records = read_rounds(tmp_path / "run")
    assert [record["given_up"] is None for record in records] == [True, True, False, True]
    assert any(word in records[2]["given_up"] for word in words.split("|")), records[2]["given_up"]
    assert records[2]["loss"] == records[1]["loss"] != records[3]["loss"]


def test_what_rank_0_receives_of_one_client_is_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of real updates, which themselves are far from it."""
    from scipy import stats

    received, plain = [], []
    upload, mask = SecureRound._upload, SecureRound._mask

    def watch(self: SecureRound, words: np.ndarray) -> np.ndarray:
        received.append(words.copy())
        return upload(self, words)

    def watch_before(self: SecureRound, *arguments: Any) -> Any:
        plain.append(np.array(self._updates.deltas).view(np.uint32))
        return mask(self, *arguments)

    monkeypatch.setattr(SecureRound, "_upload", watch)
    monkeypatch.setattr(SecureRound, "_mask", watch_before)
    run_here(tmp_path / "run", *RULES["fedavg"], SECURE)
    for client in range(10):
        words = np.concatenate([rows[client] for rows in received])
        assert stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue > 1e-6
        before = np.concatenate([rows[client] for rows in plain])
        assert abs(np.corrcoef(before.view(np.float32), words.view(np.int32))[0, 1]) < 6 / np.sqrt(len(words))
        assert stats.chisquare(np.bincount(before.view(np.uint8), minlength=256)).pvalue < 1e-6


def test_a_bound_that_is_far_too_large_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path / "run", "--federation.update_bound=1e8")
    assert capsys.readouterr().out.count("warning: the bound of the updates is so large that rounding makes") == 1


@pytest.mark.parametrize("rule", ["fedavg --federation.update_bound", "norm_clip --federation.clip_norm"])
def test_a_bound_that_leaves_nothing_of_the_updates_ends_the_run(rule: str, tmp_path: Path) -> None:
    name, bound = rule.split()
    with pytest.raises(SettingsError, match="so large that rounding leaves nothing of them in round 1"):
        run_here(tmp_path / "run", f"--federation.aggregator={name}", f"{bound}=1e12")

"""A whole round between clients and server: the exact sum, what the server sees, and everything that is noticed."""

import secrets
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

import fedprompt_mpi.secagg.client as client_module
from fedprompt_mpi.secagg.check_words import BLOCK, HASHES, CheckWords
from fedprompt_mpi.secagg.client import SEALED_BYTES, SecureClient
from fedprompt_mpi.secagg.keys import WrongKeyError, WrongMessageError
from fedprompt_mpi.secagg.masks import Masks
from fedprompt_mpi.secagg.neighbours import graph, neighbourhood
from fedprompt_mpi.secagg.server import SecureServer, WrongSumError
from fedprompt_mpi.secagg.shamir import WrongSharesError, split

SIZE = 1000
Dealt = dict[int, dict[int, bytes]]


def _sum(words: Iterable[np.ndarray], dtype: type = np.uint32) -> np.ndarray:
    return np.stack([*words]).sum(axis=0, dtype=dtype)


class Round:
    """A round of K clients, of which some come; its steps can be tampered with between one another."""

    def __init__(
        self, clients: int = 6, least: int = 4, lost: Collection[int] = (), neighbours: int | None = None
    ) -> None:
        hood = neighbourhood(clients, least)
        count = hood.neighbours if neighbours is None else neighbours
        self.threshold, self.round_id = hood.threshold, secrets.token_bytes(16)
        self.neighbours = graph(range(clients), count, np.random.default_rng(3))
        self.clients = {
            client: SecureClient(client, self.round_id, least=least, threshold=self.threshold)
            for client in range(clients)
        }
        self.server = SecureServer(self.round_id, self.neighbours, self.threshold)
        self.came = [client for client in range(clients) if client not in lost]
        self.updates = np.random.default_rng(4).integers(-(2**20), 2**20, (clients, SIZE)).astype(np.int32)
        self.advertised = {client: own.advertise() for client, own in self.clients.items()}
        self.masked: dict[int, np.ndarray] = {}
        self.checks: dict[int, np.ndarray] = {}

    def deal(self) -> Dealt:
        """Return sender -> receiver -> sealed message."""
        self.server.advertised = self.advertised
        return {
            client: own.deal({other: self.advertised[other] for other in self.neighbours[client]})
            for client, own in self.clients.items()
        }

    def accept(self, dealt: Dealt) -> None:
        for client, own in self.clients.items():
            own.accept({sender: sent[client] for sender, sent in dealt.items() if client in sent})

    def mask(self) -> None:
        hashes = CheckWords(SIZE, self.round_id)
        for client in self.came:
            words, check = self.updates[client].copy().view(np.uint32), hashes.of(self.updates[client])
            self.clients[client].mask(words, check)
            self.masked[client], self.checks[client] = words, check

    def reveal(self) -> Dealt:
        return {client: self.clients[client].reveal(self.came) for client in self.came}

    def unmask(self, revealed: Dealt) -> np.ndarray:
        total = _sum(self.masked.values())
        check = _sum(self.checks.values(), np.uint64)
        self.server.unmask(total, check, self.came, revealed)
        return total.view(np.int32)

    def run(self) -> np.ndarray:
        self.accept(self.deal())
        self.mask()
        return self.unmask(self.reveal())


@pytest.mark.parametrize("lost", [(), (1,), (0, 5), (2, 3)])
@pytest.mark.parametrize("neighbours", [None, 4])
def test_the_sum_is_exactly_that_of_those_who_came(lost: tuple[int, ...], neighbours: int | None) -> None:
    """With all others as neighbours, or with four; three of them recover a secret then, so one may be lost."""
    round_ = Round(lost=lost) if neighbours is None else Round(clients=9, least=3, lost=lost, neighbours=neighbours)
    np.testing.assert_array_equal(round_.run(), round_.updates[round_.came].sum(axis=0))


def test_sums_up_to_31_bits_wrap_nowhere() -> None:
    round_ = Round()
    round_.updates[:] = 2**30 // 6
    round_.updates[:, ::2] *= -1
    np.testing.assert_array_equal(round_.run(), round_.updates.sum(axis=0))


def test_what_the_server_receives_is_uniform_and_says_nothing_of_the_update() -> None:
    """Bytes of masked vectors of zeros, of ones and of their opposite: each passes for uniform, and no two differ."""
    samples: list[np.ndarray] = []
    for value in (0, 2**20, -(2**20)):
        sent = []
        for _ in range(20):
            round_ = Round(clients=4, least=3)
            round_.updates[:] = value
            round_.accept(round_.deal())
            round_.mask()
            sent.append(np.concatenate([round_.masked[0], round_.checks[0].view(np.uint32)]))
        samples.append(np.concatenate(sent))
    for words in samples:
        assert stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue > 1e-6
        assert stats.kstest(words / 2**32, "uniform").pvalue > 1e-6
        bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 32).mean(axis=0)
        assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(len(words))
        assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 6 / np.sqrt(len(words))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same: Any = stats.ks_2samp(samples[one], samples[other])
        assert same.pvalue > 1e-6
    bare = np.full(20 * SIZE, 2**20, dtype=np.uint32)
    assert stats.chisquare(np.bincount(bare.view(np.uint8), minlength=256)).pvalue < 1e-6  # the test can fail


def test_two_rounds_have_nothing_in_common() -> None:
    """The same update masked twice: a mask that was used again would cancel in the difference."""
    rounds = [Round(), Round()]
    for round_ in rounds:
        round_.accept(round_.deal())
        round_.mask()
    difference = rounds[0].masked[0] - rounds[1].masked[0]
    assert stats.kstest(difference / 2**32, "uniform").pvalue > 1e-6


def test_with_fewer_than_t_nothing_is_revealed() -> None:
    round_ = Round(lost=(0, 1, 2))
    round_.accept(round_.deal())
    round_.mask()
    revealed = round_.reveal()
    assert all(not shares for shares in revealed.values())
    with pytest.raises(WrongSharesError, match="0 shares are there, and 4 are needed"):
        round_.unmask(revealed)


def test_a_client_reveals_once_and_never_both_secrets() -> None:
    round_ = Round(lost=(1,))
    round_.accept(round_.deal())
    with pytest.raises(WrongMessageError, match="may not reveal"):
        round_.clients[1].reveal(round_.came)  # it is said to be lost, and is there
    shares = round_.clients[0].reveal(round_.came)
    of_key, of_seed = round_.clients[0]._shares[1]
    assert shares[1] == of_key != of_seed and shares[2] == round_.clients[0]._shares[2][1]
    with pytest.raises(WrongMessageError, match="may not reveal"):
        round_.clients[0].reveal([0, 1, 2, 3, 4, 5])


def _flip(message: bytes) -> bytes:
    return message[:20] + bytes([message[20] ^ 4]) + message[21:]


def _flipped(dealt: Dealt) -> None:
    dealt[2][3] = _flip(dealt[2][3])


def _missing(dealt: Dealt) -> None:
    del dealt[2][3]


def _swapped(dealt: Dealt) -> None:
    dealt[2][3], dealt[2][4] = dealt[2][4], dealt[2][3]


def _from_the_wrong_client(dealt: Dealt) -> None:
    dealt[2][3] = dealt[1][3]


def _of_an_earlier_round(dealt: Dealt) -> None:
    dealt[2][3] = Round().deal()[2][3]


@pytest.mark.parametrize("tamper", [_flipped, _missing, _swapped, _from_the_wrong_client, _of_an_earlier_round])
def test_a_dealt_share_that_is_wrong_is_noticed(tamper: Callable[[Dealt], None]) -> None:
    round_ = Round()
    dealt = round_.deal()
    tamper(dealt)
    with pytest.raises(WrongMessageError):
        round_.accept(dealt)


@pytest.mark.parametrize("tamper", [_flipped, _missing, _swapped, _from_the_wrong_client, _of_an_earlier_round])
def test_a_revealed_share_that_is_wrong_never_gives_a_wrong_sum(tamper: Callable[[Dealt], None]) -> None:
    """Either enough others recover the secret, or the round ends."""
    round_ = Round(lost=(5,), least=5)  # so that every share is needed
    round_.accept(round_.deal())
    round_.mask()
    revealed = round_.reveal()
    if tamper is _of_an_earlier_round:
        other = Round(lost=(5,), least=5)
        other.accept(other.deal())
        revealed[2] = other.reveal()[2]
    else:
        tamper(revealed)
    with pytest.raises((WrongSharesError, WrongSumError)):
        round_.unmask(revealed)


def test_a_client_that_lies_about_its_masking_key_is_noticed() -> None:
    """By its neighbours, which get no confirmation that it holds the key."""
    round_ = Round()
    liar = X25519PrivateKey.generate().public_key().public_bytes_raw()
    round_.advertised[2] = round_.clients[2]._own_keys = round_.advertised[2][:32] + liar
    dealt = round_.deal()
    with pytest.raises(WrongKeyError, match="client 2 does not hold the key"):
        round_.accept(dealt)


def test_a_client_that_masks_with_another_key_never_gives_a_wrong_sum() -> None:
    round_ = Round()
    round_.accept(round_.deal())
    round_.clients[2]._mask_secrets[4] = b"x" * 32
    round_.mask()
    with pytest.raises(WrongSumError):
        round_.unmask(round_.reveal())


def test_a_client_that_lies_about_its_sharing_key_is_noticed() -> None:
    round_ = Round()
    round_.advertised[2] = X25519PrivateKey.generate().public_key().public_bytes_raw() + round_.advertised[2][32:]
    with pytest.raises(WrongMessageError):
        round_.accept(round_.deal())


def test_shares_of_another_key_than_was_advertised_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client deals shares of a key that is not its own, and is lost."""
    round_ = Round(lost=(2,))
    key = round_.clients[2]._masking.private_bytes_raw()

    def split_another(secret: bytes, threshold: int, holders: Collection[int]) -> dict[int, bytes]:
        return split(b"k" * 32 if secret == key else secret, threshold, holders)

    monkeypatch.setattr(client_module, "split", split_another)
    round_.accept(round_.deal())
    round_.mask()
    with pytest.raises(WrongSharesError, match="another key than client 2 has advertised"):
        round_.unmask(round_.reveal())


@pytest.mark.parametrize("bit", [0, 7, 31])
@pytest.mark.parametrize("word", [0, SIZE // 2, SIZE - 1])
def test_a_flipped_bit_of_a_masked_update_never_gives_a_wrong_sum(bit: int, word: int) -> None:
    round_ = Round()
    round_.accept(round_.deal())
    round_.mask()
    round_.masked[1][word] ^= np.uint32(1 << bit)
    with pytest.raises(WrongSumError):
        round_.unmask(round_.reveal())


def test_an_update_of_an_earlier_round_never_gives_a_wrong_sum() -> None:
    rounds = [Round(), Round()]
    for round_ in rounds:
        round_.accept(round_.deal())
        round_.mask()
    rounds[1].masked[1], rounds[1].checks[1] = rounds[0].masked[1], rounds[0].checks[1]
    with pytest.raises(WrongSumError):
        rounds[1].unmask(rounds[1].reveal())


def test_check_words_are_linear_and_notice_every_single_error() -> None:
    """Also those for which a hash modulo a prime, or one of odd factors alone, would be blind."""
    rng, hashes = np.random.default_rng(0), CheckWords(2 * BLOCK + 5, b"round")
    updates = rng.integers(-(2**29), 2**29, (3, 2 * BLOCK + 5)).astype(np.int32)
    words = _sum((hashes.of(update) for update in updates), np.uint64)
    assert words.shape == (HASHES,)
    total = updates.sum(axis=0, dtype=np.int32)
    np.testing.assert_array_equal(hashes.of(total), words)
    for at in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 4):
        for error in (1, -1, 2**31, 2**20 - 3, 2**16 + 1, 65536):
            wrong = total.copy()
            wrong[at : at + 1] = (wrong[at : at + 1].view(np.uint32) + np.uint32(error % 2**32)).view(np.int32)
            assert (hashes.of(wrong) != words).any(), (at, error)
    swapped = total.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert (hashes.of(swapped) != words).any()
    both = total.copy()
    both[[3, 4]] = (both[[3, 4]].view(np.uint32) + np.uint32(2**31)).view(np.int32)
    assert (hashes.of(both) != words).any()
    assert (CheckWords(2 * BLOCK + 5, b"other").of(total) != words).any()


def test_the_sum_of_check_words_says_no_more_than_the_sum_of_the_updates() -> None:
    """Updates that have the same sum, shared otherwise: to the word the same."""
    rng, hashes = np.random.default_rng(0), CheckWords(SIZE, b"round")
    for _ in range(20):
        first, second, moved = rng.integers(-(2**28), 2**28, (3, SIZE)).astype(np.int32)
        ours = hashes.of(first) + hashes.of(second)
        np.testing.assert_array_equal(hashes.of(first - moved) + hashes.of(second + moved), ours)


def test_masks_go_on_where_they_were() -> None:
    """Parts of a vector get the same stream as the whole, whatever the parts."""
    keys = [(b"a" * 32, 1), (b"b" * 32, -1)]
    whole, parts = np.zeros(2 * BLOCK + 9, dtype=np.uint32), np.zeros(2 * BLOCK + 9, dtype=np.uint32)
    Masks(keys).add_to(whole)
    masks = Masks(keys)
    for at in (slice(0, 7), slice(7, BLOCK + 8), slice(BLOCK + 8, None)):
        masks.add_to(parts[at])
    np.testing.assert_array_equal(parts, whole)
    Masks([(key, -sign) for key, sign in keys]).add_to(whole)
    assert not whole.any()


def test_messages_have_their_size() -> None:
    assert {len(message) for sent in Round().deal().values() for message in sent.values()} == {SEALED_BYTES}

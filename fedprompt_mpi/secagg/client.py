"""A client of one round of secure aggregation: its secrets, and the four messages that it sends.

advertise   two public keys: for shares, and for masks
deal        to each neighbour, encrypted: a share of the private masking key and one of the own seed, and a confirmation
mask        the update in whole numbers, plus a stream of the own seed, plus or minus one of each neighbour's pair key
reveal      of each neighbour one share: of its seed if its update came, of its masking key if not; never both

All of them are made anew in each round, from the operating system's randomness: masks cancel, so the run's seed decides
the result all the same.

References:
    Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, Figure 4, without
    the signatures and the consistency check, which are for a server that breaks the protocol.
"""

import secrets
from collections.abc import Collection, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedprompt_mpi.secagg.keys import (
    CONFIRMATION_BYTES,
    KEY_BYTES,
    WrongKeyError,
    WrongMessageError,
    agree,
    confirmation,
    mask_key,
    seal,
    unseal,
)
from fedprompt_mpi.secagg.masks import Masks
from fedprompt_mpi.secagg.shamir import SHARE_BYTES, split

ADVERTISED_BYTES = 2 * KEY_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + CONFIRMATION_BYTES + 16
"""Of a dealt message; the last 16 bytes authenticate it."""


def label_of(round_id: bytes, pair: Mapping[int, bytes]) -> bytes:
    """Return what names a pair of clients and what each has advertised in a round, the same for both."""
    return round_id + b"".join(client.to_bytes(4, "big") + pair[client] for client in sorted(pair))


def way_of(sender: int, receiver: int) -> bytes:
    """Return what names a direction of a pair."""
    return sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")


def sign_of(one: int, other: int) -> int:
    """Return the sign with which a client adds a pair's stream: the lower number +1, the higher -1."""
    return 1 if one < other else -1


class SecureClient:
    """One client in one round. The methods are called in their order, each once."""

    def __init__(self, client: int, round_id: bytes, *, least: int, threshold: int) -> None:
        """Draw the secrets.

        Args:
            client: its number, below 2^32.
            round_id: public random bytes of this round.
            least: t; if fewer updates came, nothing is revealed.
            threshold: t', shares that recover a secret.
        """
        self.client, self._round_id, self._least, self._threshold = client, round_id, least, threshold
        self._sharing, self._masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._own_keys = b"".join(key.public_key().public_bytes_raw() for key in (self._sharing, self._masking))
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._advertised: Mapping[int, bytes] = {}
        self._secrets: dict[int, bytes] = {}
        """With each neighbour, of the keys for shares."""
        self._mask_secrets: dict[int, bytes] = {}
        """With each neighbour, of the keys for masks."""
        self._shares: dict[int, tuple[bytes, bytes]] = {}
        """Of each neighbour, and of this client: a share of the masking key, and of the seed."""
        self._has_revealed = False

    def advertise(self) -> bytes:
        """Return the public keys for shares and for masks."""
        return self._own_keys

    def deal(self, advertised: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return the sealed message for each neighbour, of `SEALED_BYTES`.

        Args:
            advertised: the public keys of each neighbour.

        Raises:
            WrongKeyError: if one is none.
        """
        holders, self._advertised = [self.client, *advertised], advertised
        of_key = split(self._masking.private_bytes_raw(), self._threshold, holders)
        of_seed = split(self._seed, self._threshold, holders)
        self._shares[self.client] = of_key[self.client], of_seed[self.client]
        sealed = {}
        for other, keys in advertised.items():
            label, way = self._label(other), way_of(self.client, other)
            self._secrets[other] = agree(self._sharing, keys[:KEY_BYTES])
            self._mask_secrets[other] = agree(self._masking, keys[KEY_BYTES:])
            message = of_key[other] + of_seed[other] + confirmation(self._mask_secrets[other], label, way)
            sealed[other] = seal(self._secrets[other], label, way, message)
        return sealed

    def accept(self, dealt: Mapping[int, bytes]) -> None:
        """Keep the neighbours' shares.

        Args:
            dealt: the sealed message of each neighbour.

        Raises:
            WrongMessageError: if one is missing, changed, or of another round.
            WrongKeyError: if a neighbour does not hold the private key of what it has advertised.
        """
        for other, secret in self._mask_secrets.items():
            if other not in dealt:
                raise WrongMessageError(f"client {self.client} has received no share of client {other}")
            label, way = self._label(other), way_of(other, self.client)
            message = unseal(self._secrets[other], label, way, dealt[other])
            if message[2 * SHARE_BYTES :] != confirmation(secret, label, way):
                raise WrongKeyError(f"client {other} does not hold the key that it has advertised")
            self._shares[other] = message[:SHARE_BYTES], message[SHARE_BYTES : 2 * SHARE_BYTES]

    def _label(self, other: int) -> bytes:
        return label_of(self._round_id, {self.client: self.advertise(), other: self._advertised[other]})

    def mask(self, words: np.ndarray, check: np.ndarray) -> None:
        """Hide an update `[P]` uint32 and its check words uint64, in place."""
        secrets_of = self._mask_secrets.items()
        pairs = [(mask_key(secret, self._label(other)), sign_of(self.client, other)) for other, secret in secrets_of]
        masks = Masks([(self._seed, 1), *pairs])
        masks.add_to(words)
        masks.add_to(check)

    def reveal(self, came: Collection[int]) -> dict[int, bytes]:
        """Return a share of each neighbour's secret, and of this client's own seed: what undoes the masks of the sum.

        Args:
            came: the clients whose updates came; if they are fewer than t, nothing is revealed.

        Raises:
            WrongMessageError: if this was asked before: two answers could reveal both secrets of a client.
        """
        if self._has_revealed or self.client not in came:
            raise WrongMessageError(f"client {self.client} is asked for shares that it may not reveal")
        self._has_revealed = True
        if len(came) < self._least:
            return {}
        return {other: of_seed if other in came else of_key for other, (of_key, of_seed) in self._shares.items()}

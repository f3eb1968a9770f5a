"""What rank 0 does in a round of secure aggregation: pass messages on, and take the masks off the sum.

Legend: K clients of the round, P numbers of a vector.
"""

from collections.abc import Collection, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedprompt_mpi.secagg.check_words import CheckWords
from fedprompt_mpi.secagg.client import label_of, sign_of
from fedprompt_mpi.secagg.keys import KEY_BYTES, agree, mask_key
from fedprompt_mpi.secagg.masks import Masks
from fedprompt_mpi.secagg.shamir import WrongSharesError, recover


class WrongSumError(Exception):
    """The sum is not that of the updates that came."""


class SecureServer:
    """Rank 0 in one round."""

    def __init__(self, round_id: bytes, neighbours: Mapping[int, Collection[int]], threshold: int) -> None:
        """Begin with nothing.

        Args:
            round_id: public random bytes of this round.
            neighbours: of each of K clients.
            threshold: t', shares that recover a secret.
        """
        self._round_id, self._neighbours, self._threshold = round_id, neighbours, threshold
        self.advertised: dict[int, bytes] = {}
        """Public keys of each client."""

    def unmask(
        self, total: np.ndarray, check: np.ndarray, came: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]
    ) -> None:
        """Take the masks off a sum of updates, in place.

        Args:
            total: `[P]` uint32, the sum of the masked updates modulo 2^32.
            check: `[H]` uint64, the sum of their masked check words.
            came: the clients whose updates it is of.
            revealed: what each of them has revealed of each of its neighbours and of itself.

        Raises:
            WrongSharesError: if shares are missing, or do not belong together.
            WrongSumError: if the check words do not fit.
        """
        masks = Masks([*self._seeds(came, revealed), *self._pairs_of_lost(came, revealed)])
        masks.add_to(total)
        masks.add_to(check)
        if (CheckWords(len(total), self._round_id).of(total.view(np.int32)) != check).any():
            raise WrongSumError("the sum does not fit the check words: an update was changed, or its masks are others")

    def _recover(self, owner: int, came: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]) -> bytes:
        holders = [holder for holder in (owner, *self._neighbours[owner]) if holder in came]
        shares = {holder: revealed[holder][owner] for holder in holders if owner in revealed.get(holder, {})}
        try:
            return recover(shares, self._threshold)
        except WrongSharesError as error:
            raise WrongSharesError(f"of a secret of client {owner}, {error}") from error

    def _seeds(self, came: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]) -> list[tuple[bytes, int]]:
        """Return the own streams of those whose updates came, to be subtracted."""
        return [(self._recover(client, came, revealed), -1) for client in came]

    def _pairs_of_lost(
        self, came: Collection[int], revealed: Mapping[int, Mapping[int, bytes]]
    ) -> list[tuple[bytes, int]]:
        """Return the streams that those who came share with those who are lost, which no other update cancels."""
        streams = []
        for lost in (client for client in self._neighbours if client not in came):
            others = [other for other in self._neighbours[lost] if other in came]
            if not others:
                continue
            key = X25519PrivateKey.from_private_bytes(self._recover(lost, came, revealed))
            if key.public_key().public_bytes_raw() != self.advertised[lost][KEY_BYTES:]:
                raise WrongSharesError(f"shares recover another key than client {lost} has advertised")
            for other in others:
                secret = agree(key, self.advertised[other][KEY_BYTES:])
                label = label_of(self._round_id, {at: self.advertised[at] for at in (lost, other)})
                streams.append((mask_key(secret, label), -sign_of(other, lost)))
        return streams

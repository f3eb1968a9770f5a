"""Secret sharing: any t shares recover a secret, t - 1 say nothing, a wrong one is noticed."""

import hashlib
import itertools
import math
import secrets

import pytest

from fedprompt_mpi.secagg.shamir import HASH_BYTES, PRIME, SHARE_BYTES, WrongSharesError, recover, split

SECRET = bytes(range(32))
HOLDERS = (0, 3, 4, 9, 100_000)


@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
@pytest.mark.parametrize("secret", [SECRET, bytes(32), b"\xff" * 32])
def test_any_t_shares_recover_it(secret: bytes, threshold: int) -> None:
    shares = split(secret, threshold, HOLDERS)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    for chosen in itertools.combinations(HOLDERS, threshold):
        assert recover({holder: shares[holder] for holder in chosen}, threshold) == secret
    assert recover(shares, threshold) == secret


def test_fewer_are_refused_and_fit_every_secret() -> None:
    """For any secret there is a share of a third holder with which t - 1 shares recover it: so they say nothing."""
    shares = split(SECRET, 3, HOLDERS)
    known = {holder: int.from_bytes(shares[holder], "big") for holder in (0, 3)}
    with pytest.raises(WrongSharesError, match="2 shares are there, and 3 are needed"):
        recover({holder: shares[holder] for holder in known}, 3)
    for other in (bytes(32), secrets.token_bytes(32)):
        points = {
            0: int.from_bytes(other + hashlib.sha256(other).digest()[:HASH_BYTES], "big"),
            **{holder + 1: value for holder, value in known.items()},
        }
        third = sum(
            value
            * _product([5 - at for at in points if at != x])
            * pow(_product([x - at for at in points if at != x]), -1, PRIME)
            for x, value in points.items()
        )  # the polynomial through these points, at 5
        forged = {**{holder: shares[holder] for holder in known}, 4: (third % PRIME).to_bytes(SHARE_BYTES, "big")}
        assert recover(forged, 3) == other


def _product(factors: list[int]) -> int:
    return math.prod(factors) % PRIME


def test_a_share_that_does_not_belong_is_noticed() -> None:
    shares, others = split(SECRET, 3, HOLDERS), split(SECRET, 3, HOLDERS)
    for wrong in (others[4], (int.from_bytes(shares[4], "big") ^ 1).to_bytes(SHARE_BYTES, "big"), shares[3]):
        with pytest.raises(WrongSharesError, match="do not belong together"):
            recover({0: shares[0], 3: shares[3], 4: wrong}, 3)

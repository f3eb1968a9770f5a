"""Agreement, derivation and encryption: the vectors of the RFCs, and what is noticed."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedprompt_mpi.secagg.keys import (
    WrongKeyError,
    WrongMessageError,
    agree,
    confirmation,
    derive,
    mask_key,
    seal,
    unseal,
)

hexed = bytes.fromhex


@pytest.mark.parametrize(
    ("scalar", "point", "product"),
    [
        ("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
         "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
         "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"),
        ("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
         "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
         "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957"),
    ],
)  # fmt: skip
def test_rfc_7748_section_5_2(scalar: str, point: str, product: str) -> None:
    assert agree(X25519PrivateKey.from_private_bytes(hexed(scalar)), hexed(point)) == hexed(product)


def test_rfc_7748_section_6_1() -> None:
    alice = X25519PrivateKey.from_private_bytes(
        hexed("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = X25519PrivateKey.from_private_bytes(hexed("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    publics = [own.public_key().public_bytes_raw() for own in (alice, bob)]
    assert publics[0] == hexed("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert publics[1] == hexed("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    secret = hexed("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert agree(alice, publics[1]) == agree(bob, publics[0]) == secret


@pytest.mark.parametrize(
    ("secret", "salt", "purpose", "derived"),
    [
        (b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)),
         "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"),
        (bytes(range(80)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100)),
         "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09"
         "b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"),
        (b"\x0b" * 22, b"", b"",
         "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
    ],
)  # fmt: skip
def test_rfc_5869_appendix_a(secret: bytes, salt: bytes, purpose: bytes, derived: str) -> None:
    size = len(derived) // 2
    assert HKDF(algorithm=SHA256(), length=size, salt=salt, info=purpose).derive(secret) == hexed(derived)
    assert (derive(secret, purpose, size) == hexed(derived)) == (not salt)  # ours takes none


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31, "ecffffff" + "ff" * 27 + "7f"])
def test_a_public_key_of_small_order_is_refused(point: str) -> None:
    with pytest.raises(WrongKeyError):
        agree(X25519PrivateKey.generate(), hexed(point))


def test_each_round_and_each_direction_has_keys_of_its_own() -> None:
    secret = b"s" * 32
    assert mask_key(secret, b"round 1") == mask_key(secret, b"round 1") != mask_key(secret, b"round 2")
    ways = {confirmation(secret, label, way) for label in (b"round 1", b"round 2") for way in (b"there", b"back")}
    assert len(ways) == 4  # a client cannot send back what it has received


def test_a_sealed_message_is_opened_by_the_same_pair_round_and_direction_alone() -> None:
    sealed = seal(b"s" * 32, b"label", b"to here", b"a share")
    assert unseal(b"s" * 32, b"label", b"to here", sealed) == b"a share"
    flipped = bytes([sealed[0] ^ 1, *sealed[1:]])
    for secret, label, way, message in (
        (b"t" * 32, b"label", b"to here", sealed),
        (b"s" * 32, b"other", b"to here", sealed),
        (b"s" * 32, b"label", b"to him", sealed),
        (b"s" * 32, b"label", b"to here", flipped),
        (b"s" * 32, b"label", b"to here", sealed[:-1]),
    ):
        with pytest.raises(WrongMessageError):
            unseal(secret, label, way, message)

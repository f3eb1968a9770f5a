"""Keys of two clients, and what they encrypt for each other. Every primitive is the package cryptography's.

References:
    RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305).
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
CONFIRMATION_BYTES = 16


class WrongKeyError(Exception):
    """A public key is none, or its owner does not hold the private one."""


class WrongMessageError(Exception):
    """What a client has received is not what another has encrypted for it in this round."""


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the secret of a private key and another's public one, of `KEY_BYTES`.

    Raises:
        WrongKeyError: if the public key is no point that can be used.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # of small order: the secret would be zero whoever agrees
        raise WrongKeyError("a public key is none") from error


def derive(secret: bytes, purpose: bytes, size: int) -> bytes:
    """Return a key of so many bytes for a purpose."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=purpose).derive(secret)


def mask_key(secret: bytes, label: bytes) -> bytes:
    """Return the key of the stream that one of a pair adds and the other subtracts, from their masking keys' secret."""
    return derive(secret, b"mask" + label, KEY_BYTES)


def confirmation(secret: bytes, label: bytes, way: bytes) -> bytes:
    """Return what a client sends in one direction to show that it holds the masking key it has advertised."""
    return derive(secret, b"confirmation" + label + way, CONFIRMATION_BYTES)


def seal(secret: bytes, label: bytes, way: bytes, message: bytes) -> bytes:
    """Return a message encrypted and authenticated, for one direction of a pair, `way`, which has no second message."""
    return ChaCha20Poly1305(derive(secret, b"shares" + label, KEY_BYTES)).encrypt(_nonce(way), message, label + way)


def unseal(secret: bytes, label: bytes, way: bytes, sealed: bytes) -> bytes:
    """Return the message that `seal` has encrypted with the same arguments.

    Raises:
        WrongMessageError: if it is another, of another round or another client, or changed on its way.
    """
    try:
        return ChaCha20Poly1305(derive(secret, b"shares" + label, KEY_BYTES)).decrypt(_nonce(way), sealed, label + way)
    except InvalidTag as error:
        raise WrongMessageError("a share was changed on its way, or is of another round") from error


def _nonce(way: bytes) -> bytes:
    """Return 12 bytes: a key belongs to a pair and a round, so the two directions need two nonces."""
    return way[:12].ljust(12, b"\0")

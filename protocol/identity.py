"""Who a peer is: one Ed25519 key in one file, the same peer id in every network stack that reads it.

The file is libp2p's `PrivateKey` protobuf. For Ed25519 it has one encoding only, so it is compared, not parsed:

    08 01        field 1, varint: KeyType 1 = Ed25519
    12 40        field 2, 64 bytes:
    <32> <32>    seed, public key

The Go daemon reads that file (`-id`). py-libp2p wants the bare seed, see `Identity.seed`. A peer id is base58 of the
identity multihash of the public key's protobuf, `00 24 | 08 01 12 20 | <32 bytes>`: the key stands in the id itself, so
a signature can be checked with nothing but the id of its signer.
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import BadSignature, IdentityError

SEED_BYTES = 32
SIGNATURE_BYTES = 64

_PRIVATE_PREFIX = bytes.fromhex("08011240")
_PRIVATE_FILE_BYTES = len(_PRIVATE_PREFIX) + 64
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_BYTES = len(_PEER_ID_PREFIX) + 32
_PEER_ID_CHARS = 52  # every 38-byte id with that prefix has this many base58 digits and starts with 12D3KooW
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Identity:
    """A peer's private key. Never printed: `repr` shows the peer id only.

    Attributes:
        peer_id: base58 libp2p id, "12D3KooW...".
        seed: the 32 secret bytes that the key pair is derived from.
    """

    __slots__ = ("_key", "peer_id", "seed")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"an Ed25519 seed has {SEED_BYTES} bytes, got {len(seed)}")
        self.seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.peer_id = _encode_peer_id(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the system's random source."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read libp2p's PrivateKey protobuf. Raises IdentityError on anything but an intact Ed25519 key."""
        if len(data) >= 2 and data[0] == _PRIVATE_PREFIX[0] and data[1] != _PRIVATE_PREFIX[1]:
            raise IdentityError("the key is not an Ed25519 key", fix="use the key that `shoal` made, or a new file")
        if len(data) != _PRIVATE_FILE_BYTES or not data.startswith(_PRIVATE_PREFIX):
            raise IdentityError(
                f"{len(data)} bytes do not form a libp2p Ed25519 private key ({_PRIVATE_FILE_BYTES} bytes)",
                fix="restore the file from a backup, or delete it to become a new peer",
            )
        identity = cls(data[len(_PRIVATE_PREFIX) :][:SEED_BYTES])
        if identity.to_bytes() != data:
            raise IdentityError(
                "the stored public key does not belong to the stored seed",
                fix="restore the file from a backup, or delete it to become a new peer",
            )
        return identity

    def to_bytes(self) -> bytes:
        """libp2p's PrivateKey protobuf, 68 bytes. Secret."""
        return _PRIVATE_PREFIX + self.seed + self._key.public_key().public_bytes_raw()

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read an identity file. Raises IdentityError if it is missing, readable by others, or corrupt."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                data = file.read(_PRIVATE_FILE_BYTES + 1)
        except OSError as error:
            raise IdentityError(
                f"cannot read the identity file {path}: {error.strerror}", fix="check the path and its permissions"
            ) from error
        if mode & 0o077:
            raise IdentityError(
                f"the identity file {path} is open to other users (mode {mode:04o})", fix=f"chmod 600 {path}"
            )
        try:
            return cls.from_bytes(data)
        except IdentityError as error:
            raise IdentityError(f"the identity file {path} is unusable: {error.cause}", fix=error.fix) from error

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read an identity file; if there is none, make one (mode 0600), and missing directories above it.

        Processes that race to create the same file all return the one that won. A crash leaves the whole file or none.
        """
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(identity.to_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                os.link(draft, path)  # unlike rename, refuses to replace a key that another process has just made
            finally:
                draft.unlink()
        except FileExistsError:
            return cls.load(path)
        except OSError as error:
            raise IdentityError(
                f"cannot create the identity file {path}: {error.strerror}",
                fix="make its directory writable, or choose another data directory",
            ) from error
        return identity

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature of `message`, 64 bytes."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def verify(peer_id: str, message: bytes, signature: bytes) -> None:
    """Return if `signature` is `peer_id`'s for `message`; raise BadSignature otherwise."""
    try:
        key = _public_key(peer_id)
    except ValueError as error:
        raise BadSignature(str(error)) from error
    try:
        key.verify(signature, message)
    except InvalidSignature as error:
        raise BadSignature(f"the signature is not {peer_id}'s") from error


def check_peer_id(peer_id: str) -> None:
    """Return if `peer_id` is the id of an Ed25519 key in its one canonical spelling; raise ValueError otherwise."""
    _decode_peer_id(peer_id)


@lru_cache(maxsize=4096)
def _public_key(peer_id: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_decode_peer_id(peer_id))


def _encode_peer_id(public_key: bytes) -> str:
    number = int.from_bytes(_PEER_ID_PREFIX + public_key)
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_BASE58[digit])
    return "1" + "".join(reversed(digits))  # the multihash's leading zero byte


def _decode_peer_id(peer_id: str) -> bytes:
    if len(peer_id) != _PEER_ID_CHARS or not peer_id.startswith("12D3KooW"):
        raise ValueError(f"{peer_id[:64]!r} is not the peer id of an Ed25519 key")
    number = 0
    for char in peer_id:
        digit = _BASE58.find(char)
        if digit < 0:
            raise ValueError(f"{peer_id!r} is not base58: {char!r}")
        number = number * 58 + digit
    data = number.to_bytes(_PEER_ID_BYTES)  # cannot overflow: the first digits fix the magnitude
    if not data.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"{peer_id!r} is not the peer id of an Ed25519 key")
    return data[len(_PEER_ID_PREFIX) :]

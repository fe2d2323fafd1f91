"""Prefix-preserving pseudonyms for addresses: Crypto-PAn.

Two addresses that share exactly their first k bits have pseudonyms that share exactly k bits, so networks
survive, and with them counts of /24s and what a model sees of destinations. Bit k of a pseudonym is that of
the address, flipped or not by one AES block over the k bits before it. So the work is shared: addresses are
sorted, and each distinct prefix is encrypted once, all of one length in one call.

Without the key the mapping cannot be undone. But whoever can make the telescope record a packet of his own
learns the pseudonyms of its source and of that source's prefixes: the price of keeping prefixes at all.

Source: J. Xu, J. Fan, M. Ammar, S. Moon, "Prefix-Preserving IP Address Anonymization", ICNP 2002.
"""

from __future__ import annotations

import hashlib
import hmac
import re

import numpy as np
import pyarrow as pa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from rayscan.captures.values import Ints
from rayscan.errors import ConfigError

_KEY_BYTES = 32  # 16 for AES, 16 for the padding


def key_of(given: bytes, place: str) -> bytes:
    """The key, given as 64 hexadecimal digits or as 32 bytes. Raises ConfigError, which never shows it."""
    key = given if len(given) == _KEY_BYTES else given.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", key):
        return bytes.fromhex(key.decode())
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"the key in {place} must be 64 hexadecimal digits or 32 bytes, not {len(key)} bytes"
        )
    return key


def check_value(key: bytes, salt: bytes) -> str:
    """What tells two keys apart without telling either: slow to compute, for keys that can be guessed."""
    return hashlib.scrypt(key, salt=salt, n=2**14, r=8, p=1, dklen=16).hex()


def is_key(key: bytes, salt: bytes, value: str) -> bool:
    return hmac.compare_digest(check_value(key, salt), value)


class Pseudonyms:
    """The mapping of one key."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key[:16]), modes.ECB())
        self._pad = np.frombuffer(self._encrypted(key[16:]), np.uint8)

    def __call__(self, addresses: Ints) -> Ints:
        """Pseudonyms of IPv4 addresses, both as numbers in [0, 2^32), shape (N,)."""
        distinct, place = np.unique(addresses, return_inverse=True)
        return self._of_sorted(distinct)[place]

    def _of_sorted(self, addresses: Ints) -> Ints:
        flips = np.zeros(len(addresses), np.int64)
        if not len(addresses):
            return flips
        pad = int.from_bytes(self._pad[:4].tobytes(), "big")
        for k in range(32):
            prefix = addresses >> (32 - k)
            first = np.r_[True, prefix[1:] != prefix[:-1]]
            head = prefix[first] << (32 - k) | pad & ((1 << (32 - k)) - 1)
            blocks = np.tile(self._pad, (len(head), 1))
            blocks[:, :4] = head.astype(">u4").view(np.uint8).reshape(-1, 4)
            out = np.frombuffer(self._encrypted(blocks.tobytes()), np.uint8)[::16]
            flips = flips << 1 | (out >> 7)[np.cumsum(first) - 1]
        return addresses ^ flips

    def _encrypted(self, blocks: bytes) -> bytes:
        return self._cipher.encryptor().update(blocks)

    def hide(self, flows: pa.Table) -> pa.Table:
        """Flows with pseudonyms in place of their sources and destinations."""
        for name in ("src", "dst"):
            column = flows[name].combine_chunks()
            hidden = self(column.fill_null(0).to_numpy())
            absent = column.is_null().to_numpy(zero_copy_only=False)
            place = flows.schema.get_field_index(name)
            flows = flows.set_column(place, flows.schema.field(name), pa.array(hidden, mask=absent))
        return flows

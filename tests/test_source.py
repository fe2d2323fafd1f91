"""A capture's bytes: absolute limits of what is decompressed, and the memory of repeated rows."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections import deque

import numpy as np
import pyarrow as pa
import pytest

from rayscan.captures.detect import open_capture
from rayscan.captures.duplicates import Seen, row_hashes
from rayscan.captures.source import compression_of
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError

TEXT = b"ts,src,dst_port,proto\n" + np.random.default_rng(0).bytes(400_000).hex().encode()


def test_compressions_are_told_by_their_first_bytes() -> None:
    packed = {
        "gzip": gzip.compress(TEXT),
        "bz2": bz2.compress(TEXT),
        "xz": lzma.compress(TEXT),
        "zstd": pa.compress(TEXT, codec="zstd", asbytes=True),
    }
    assert {compression_of(data[:8]): compression_of(TEXT[:8]) for data in packed.values()} == dict.fromkeys(
        packed
    )


def test_no_capture_grows_beyond_the_limit() -> None:
    """However well it deserves its size: the limit is absolute."""
    packed = io.BytesIO(gzip.compress(TEXT))
    _, stream = open_capture(packed, "some.gz", CapturesConfig(max_gb=len(TEXT) / 1e9))
    assert stream.read() == TEXT
    _, stream = open_capture(packed, "some.gz", CapturesConfig(max_gb=0.0005))
    taken = stream.read(100_000)
    assert taken == TEXT[:100_000]
    message = r"some\.gz.*expands to more than 0\.0005 GB; if it is genuine, raise captures\.max_gb"
    with pytest.raises(FormatError, match=message):
        while piece := stream.read(100_000):
            taken += piece
    assert 400_000 <= len(taken) <= 500_000
    assert TEXT.startswith(taken)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_repeated_rows_are_seen_as_far_back_as_promised(batch: int) -> None:
    """Against a plain search: everything within `most` distinct rows, nothing beyond twice as many."""
    rng = np.random.default_rng(batch)
    values = rng.integers(0, 300, 2000)
    seen, found = Seen(most=60), []
    for start in range(0, len(values), batch):
        found += seen.repeats(pa.table({"x": values[start : start + batch]})).tolist()
    near: deque[int] = deque(maxlen=60)  # the latest distinct rows, repeated ones in their first place
    far: deque[int] = deque(maxlen=2 * (60 + batch))
    for value, said in zip(values.tolist(), found, strict=True):
        assert said or value not in near
        assert not said or value in far
        if not said:
            near.append(value)
            far.append(value)
    assert 0 < sum(found) < len(values)


def test_memory_of_repeated_rows_is_bounded() -> None:
    seen = Seen(most=1000)
    for start in range(0, 100_000, 250):
        assert not seen.repeats(pa.table({"x": np.arange(start, start + 250)})).any()
        assert sum(map(len, (*seen._runs, *seen._older))) <= 2 * 1000 + 250
    assert len(np.unique(row_hashes(pa.table({"x": np.arange(1000)})))) == 1000


PACK = {"bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("name", PACK)
def test_members_behind_each_other(name: str) -> None:
    """Zeros between them are padding. What is neither is said, also where whole members stand before it."""
    text = TEXT[:20_000]
    one = PACK[name](text)
    damaged = bytearray(one)
    damaged[2] ^= 0xFF
    for between in (b"", bytes(8), bytes(1 << 20)):
        _, stream = open_capture(io.BytesIO(one + between + one + bytes(4)), "some", CapturesConfig())
        assert stream.read() == 2 * text
        for bad in (bytes(damaged), b"?", one[:5], one[:-1]):
            _, stream = open_capture(io.BytesIO(one + between + bad), "some", CapturesConfig())
            taken = b""
            with pytest.raises(FormatError, match=f"damaged: {name}"):
                while piece := stream.read1(1 << 20):
                    taken += piece
            assert taken.startswith(text)


def test_xz_does_not_take_all_memory() -> None:
    """A dictionary of 1 GiB, which costs the attacker nothing."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(TEXT[:100], check=lzma.CHECK_NONE, filters=filters))
    place = packed.index(bytes([0x21, 1, 16]), 12)  # LZMA2, one byte of properties: the dictionary
    packed[place + 2] = 36
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    with pytest.raises(FormatError, match="damaged: xz: Memory usage limit exceeded"):
        open_capture(io.BytesIO(bytes(packed)), "some.xz", CapturesConfig())[1].read()

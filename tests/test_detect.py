"""What a file is, whatever it is called: compression, format, bombs and damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest

from rayscan.captures import source
from rayscan.captures.columns import Batch
from rayscan.captures.detect import READERS, SIGNATURES, open_capture, read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError, SchemaError

HEAD = b"ts,src,dst_port,proto\n"
ROW = b"2024-03-01T12:00:00Z,1.2.3.4,23,tcp\n"
CSV = HEAD + ROW * 1000

Compress = Callable[[bytes], bytes]
COMPRESS: dict[str, Compress] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(data: bytes, max_ratio: int = 1000) -> tuple[str, list[Batch]]:
    kind, batches = read_capture(io.BytesIO(data), "some.file", CapturesConfig(max_ratio=max_ratio), 300)
    return kind, list(batches)


def rows(batches: list[Batch]) -> int:
    return sum(batch.flows.num_rows for batch in batches)


def parquet() -> bytes:
    file = io.BytesIO()
    table = pa.table(
        {"ts": [1_709_294_400, 1_709_294_401], "src": [3, 4], "dst_port": [5, 6], "proto": [6, 6]}
    )
    table = table.set_column(0, "ts", table["ts"].cast(pa.timestamp("s", "UTC")))
    pq.write_table(table, file)
    return file.getvalue()


def test_plain_files() -> None:
    kind, batches = read(CSV)
    assert (kind, rows(batches)) == ("csv", 1000)
    kind, stream = open_capture(io.BytesIO(parquet()), "f", CapturesConfig())
    assert (kind, stream.read()) == ("parquet", parquet())


def test_files_of_arrow(tmp_path: Path) -> None:
    for data in (CSV, parquet(), gzip.compress(CSV), gzip.compress(parquet())):
        path = tmp_path / "capture"
        path.write_bytes(data)
        with fs.LocalFileSystem().open_input_file(str(path)) as file:
            batches = list(read_capture(file, "f", CapturesConfig(), 300)[1])
        assert rows(batches) in (1000, 2)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(parquet()[:-5], "parquet"), (b"a,b\n1,2\n", "csv"), (b"ORC\x00\x01", "orc"), (b'{"a":1}\n', "json")],
)
def test_the_format_is_known_also_where_nothing_is_read(data: bytes, kind: str) -> None:
    found, batches = read_capture(io.BytesIO(data), "f", CapturesConfig(), 300)
    assert found == kind
    with pytest.raises((FormatError, SchemaError)):
        next(batches)


def test_a_zeek_log_that_begins_with_another_header_line() -> None:
    head = b"#set_separator\t,\n#empty_field\t(empty)\n#fields\tts\tid.orig_h\n"
    assert open_capture(io.BytesIO(head), "f", CapturesConfig())[0] == "zeek"
    assert open_capture(io.BytesIO(b"#a,#fields\tb\n1,2\n"), "f", CapturesConfig())[0] == "csv"


def test_the_stream_begins_at_the_beginning() -> None:
    file = io.BytesIO(CSV)
    file.read(100)
    assert open_capture(file, "f", CapturesConfig())[1].read() == CSV


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_files(name: str) -> None:
    compress = COMPRESS[name]
    kind, batches = read(compress(CSV))
    assert (kind, rows(batches)) == ("csv", 1000)
    two_members = compress(CSV) + compress(ROW * 5)
    assert rows(read(two_members)[1]) == 1005
    assert open_capture(io.BytesIO(compress(b"{}")), "f", CapturesConfig())[0] == "json"


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_parquet_is_unpacked(name: str) -> None:
    kind, stream = open_capture(io.BytesIO(COMPRESS[name](parquet())), "f", CapturesConfig())
    assert kind == "parquet"
    assert stream.seekable()
    assert stream.read() == parquet()
    with pytest.raises(FormatError, match=r"some\.file: damaged: Parquet footer"):
        read(COMPRESS[name](parquet()[:-5]))


@pytest.mark.parametrize("compress", [lambda data: data, *COMPRESS.values()], ids=["plain", *COMPRESS])
def test_empty_files(compress: Compress) -> None:
    with pytest.raises(FormatError, match=r"some\.file: empty file"):
        read(compress(b""))


def numbered(n: int) -> bytes:
    """Text that does not compress to nothing."""
    return b"n," + HEAD + b"".join(b"%d," % (i * 7919 % 20_011) + ROW for i in range(n))


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("cut", ["head", "middle", "end"])
def test_truncated_files(name: str, cut: str) -> None:
    """What stands before the damage is read, and the damage is an error: never a silent end."""
    whole = COMPRESS[name](numbered(8000))
    data = whole[: {"head": 8, "middle": len(whole) // 2, "end": len(whole) - 1}[cut]]
    flows = 0
    with pytest.raises(FormatError, match=f"some\\.file.*damaged: {name}"):
        for batch in read_capture(io.BytesIO(data), "some.file", CapturesConfig(), 300)[1]:
            flows += batch.flows.num_rows
            assert not batch.rejects
    if cut == "end" and name != "bz2":  # bz2 gives nothing of a block that is not whole
        assert flows >= 8000 - (1 << 16) // len(ROW)


@pytest.mark.parametrize("name", ["gzip", "bz2", "xz"])  # Arrow writes zstd without a checksum
def test_damaged_files(name: str) -> None:
    data = bytearray(COMPRESS[name](numbered(8000)))
    for place in range(len(data) // 2, len(data) // 2 + 64):
        data[place] ^= 0xFF
    with pytest.raises(FormatError, match=f"damaged: {name}"):
        stream = open_capture(io.BytesIO(data), "f", CapturesConfig())[1]
        while stream.read(1 << 16):
            pass


@pytest.mark.parametrize("name", COMPRESS)
def test_bombs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FREE_BYTES", 1 << 18)
    bomb = COMPRESS[name](HEAD + ROW * 20_000)  # 0.7 MB
    ratio = 20_000 * len(ROW) // len(bomb)
    assert ratio > 60
    with pytest.raises(FormatError, match=r"some\.file.*expands more than 20 times.*captures\.max_ratio"):
        read(bomb, max_ratio=20)
    assert rows(read(bomb, max_ratio=2 * ratio)[1]) == 20_000
    small = COMPRESS[name](HEAD + ROW * 5000)  # below what is free
    assert rows(read(small, max_ratio=1)[1]) == 5000


@pytest.mark.parametrize("magic", SIGNATURES)
def test_formats_without_a_reader_are_named(magic: bytes) -> None:
    name = SIGNATURES[magic]
    assert open_capture(io.BytesIO(magic + bytes(100)), "f", CapturesConfig())[0] == name
    if name not in READERS:
        with pytest.raises(FormatError, match=f"some\\.file: {name} captures are not supported yet"):
            read(magic + bytes(100))


def test_files_that_are_nothing() -> None:
    for data in (
        b"\x00\x01,",
        bytes(100),
        b"hello world\n",
        b"\xff\xd8\xff\xe0,\x00",
        b"\x7fELF\x02,;",
        b"   \n",
    ):
        with pytest.raises(FormatError, match="not a capture in a known format"):
            read(data)
    with pytest.raises(FormatError, match="not a capture in a known format"):
        read(gzip.compress(gzip.compress(CSV)))


def test_a_byte_order_mark_and_blank_lines() -> None:
    assert rows(read(b"\xef\xbb\xbf" + CSV)[1]) == 1000
    assert rows(read(b"\r\n\n" + CSV)[1]) == 1000
    assert open_capture(io.BytesIO(b'\xef\xbb\xbf {"a": 1}'), "f", CapturesConfig())[0] == "json"


def test_failing_storage_is_not_damage() -> None:
    class Unplugged(io.BytesIO):
        broken = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.broken:
                raise TimeoutError("storage went away")
            return super().read(size)

    file = Unplugged(gzip.compress(HEAD + os.urandom(3 << 20).hex().encode()))
    stream = open_capture(file, "f", CapturesConfig())[1]
    file.broken = True
    with pytest.raises(TimeoutError, match="storage went away"):
        while stream.read(1 << 20):
            pass


@pytest.mark.data
@pytest.mark.skipif("RAYSCAN_DATA" not in os.environ, reason="RAYSCAN_DATA is not set")
def test_real_files() -> None:
    folder = Path(os.environ["RAYSCAN_DATA"]) / "captures"
    for pattern, kinds in {
        "pcap/*": {"pcap", "pcapng"},
        "zeek/*": {"zeek", "zeek-json"},
        "suricata/*": {"eve"},
        "argus/*": {"csv"},
        "spoki/*": {"csv"},
    }.items():
        for path in folder.glob(pattern):
            with path.open("rb") as file:
                assert open_capture(file, path.name, CapturesConfig())[0] in kinds

"""nfdump: its files through the program, what it prints, and tables of other flow programs."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from rayscan.captures import nfdump
from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError, SchemaError

installed = pytest.mark.skipif(
    not (shutil.which("nfdump") and shutil.which("nfpcapd")), reason="the program nfdump is not installed"
)


def read(data: bytes, batch_rows: int = 1000, **settings: object) -> tuple[str, Batch]:
    kind, batches = read_capture(io.BytesIO(data), "some.file", CapturesConfig(**settings), batch_rows)
    parts = list(batches)
    flows = pa.concat_tables([BATCH.empty_table(), *(part.flows for part in parts)])
    return kind, Batch(flows, merge_rejects(reject for part in parts for reject in part.rejects))


def ipv4(proto: int, src: int, body: bytes) -> bytes:
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(body), 1, 0, 64, proto, 0, src, 0xC6120001)
    return head + body


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Six packets as nfpcapd stores them."""
    folder = tmp_path_factory.mktemp("nfdump")
    tcp = struct.pack("!HHIIBBHHH", 40_000, 23, 1, 0, 0x50, 2, 1024, 0, 0)
    packets = [ipv4(6, 1, tcp), ipv4(17, 2, struct.pack("!HHHH", 53, 5353, 28, 0) + bytes(20))]
    packets += [
        ipv4(1, 3, struct.pack("!BBHHH", kind, code, 0, 1, 1)) for kind, code in ((8, 0), (3, 13), (0, 0))
    ]
    data = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 101)
    for second, packet in enumerate(packets):
        data += struct.pack("<IIII", 1_700_000_000 + second, 123_000, len(packet), len(packet)) + packet
    (folder / "pcap").write_bytes(data)
    (folder / "out").mkdir()
    command = ["nfpcapd", "-r", str(folder / "pcap"), "-w", str(folder / "out")]
    subprocess.run(command, capture_output=True, check=True)
    (file,) = (folder / "out").iterdir()
    return file.read_bytes()


EXPECT = [
    {"src": 1, "dst_port": 23, "src_port": 40_000, "proto": 6, "tcp_flags": 2, "icmp_code": None},
    {"src": 2, "dst_port": 5353, "src_port": 53, "proto": 17, "tcp_flags": None, "icmp_code": None},
    {"src": 3, "dst_port": 8, "src_port": None, "proto": 1, "tcp_flags": None, "icmp_code": 0},
    {"src": 3, "dst_port": 3, "src_port": None, "proto": 1, "tcp_flags": None, "icmp_code": 13},
    {"src": 3, "dst_port": 0, "src_port": None, "proto": 1, "tcp_flags": None, "icmp_code": 0},
]


@installed
def test_the_program_is_held_to_its_limits(captured: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfdump, "_KIBIBYTES", 1 << 10)
    with pytest.raises(FormatError, match="damaged: nfdump says"):
        read(captured)


@installed
@pytest.mark.parametrize("batch_rows", [1, 1000])
def test_a_file(captured: bytes, batch_rows: int) -> None:
    kind, batch = read(captured, batch_rows)
    assert (kind, batch.rejects) == ("nfdump", [])
    rows = batch.flows.sort_by("ts")
    assert rows.select(list(EXPECT[0])).to_pylist() == EXPECT
    assert rows["ts"].cast(pa.int64()).to_pylist() == [
        (1_700_000_000 + s) * 10**6 + 123_000 for s in range(5)
    ]
    assert rows["dst"].to_pylist() == [0xC6120001] * 5
    assert rows["packets"].to_pylist() == [1] * 5


@installed
def test_damaged_files(captured: bytes) -> None:
    for data in (captured[:20], captured[:-30], b"\x0c\xa5" + bytes(300)):
        with pytest.raises(FormatError, match=r"some\.file: damaged: nfdump says: "):
            read(data)


@installed
@pytest.mark.parametrize("mode", ["csv", "line", "long", "extended"])
def test_what_it_prints(captured: bytes, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(captured)
    command = ["nfdump", "-r", str(path), "-o", mode]
    printed = subprocess.run(command, capture_output=True, check=True, env={"TZ": "Europe/Berlin"}).stdout
    kind, batch = read(printed, time_zone="Europe/Berlin")
    assert (kind, batch.rejects) == ("csv" if mode == "csv" else "nfdump-text", [])
    rows = batch.flows.sort_by("ts")
    known = ["src", "dst_port", "proto"]
    assert rows.select(known).to_pylist() == [{key: row[key] for key in known} for row in EXPECT]
    assert rows["icmp_code"].to_pylist()[2:4] == [0, 13]
    assert {us // 10**6 for us in rows["ts"].cast(pa.int64()).to_pylist()} == {
        1_700_000_000 + s for s in range(5)
    }
    with pytest.raises(SchemaError, match=r"set captures\.time_zone"):
        read(printed)


def test_without_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfdump, "PROGRAM", "no-such-program")
    with pytest.raises(
        FormatError, match="nfdump, which reads this format, is not installed on this machine"
    ):
        read(b"\x0c\xa5" + bytes(300))


def test_printed_lines_that_are_odd() -> None:
    lines = [
        "Date first seen Duration Proto Src IP Addr:Port Dst IP Addr:Port Packets Bytes Flows",
        "2024-03-01 12:00:00.000 0.000 TCP 1.2.3.4:40000 -> 198.18.0.1:23 1 40 1",
        "2024-03-01 12:00:00.000 0.000 TCP 1.2.3.4:40000 -> 198.18.0.1:23 1.2 M 3.4 G 1",
        "2024-03-01 12:00:00.000 0.000 GRE 1.2.3.4:0 -> 198.18.0.1:0 1 40 1",
        "2024-03-01 12:00:00.000 0.000 UDP 2001:db8::1.53 -> 2001:db8::2.53 1 40 1",
        "garbage",
        "Summary: total flows: 5, total bytes: 1",
    ]
    _, batch = read("\n".join(lines).encode(), time_zone="UTC")
    assert batch.flows["packets"].to_pylist() == [1, None, 1]
    assert {(r.reason, r.offset, r.count) for r in batch.rejects} == {
        ("not a flow", 4, 2),
        ("packets unreadable (kept as missing)", 2, 1),
        ("size unreadable (kept as missing)", 2, 1),
    }


# ---------------------------------------------------------------------------------------------
# Tables of other programs
# ---------------------------------------------------------------------------------------------


def test_silk_rwcut() -> None:
    text = (
        "        sIP|        dIP|sPort|dPort|pro|packets|bytes| flags|                  sTime|  sen|\n"
        "    1.2.3.4| 198.18.0.1|40000|   23|  6|      1|   40| S    |2024/03/01T12:00:00.250|north|\n"
        "    1.2.3.4| 198.18.0.1|    0|  781|  1|      2|  112|      |2024/03/01T12:00:01.000|north|\n"
    )
    _, batch = read(text.encode())
    assert batch.rejects == []
    rows = batch.flows.drop_columns(["ts"]).to_pylist()
    assert [row["dst_port"] for row in rows] == [23, 3]
    assert [row["icmp_code"] for row in rows] == [None, 13]
    assert [row["tcp_flags"] for row in rows] == [2, None]
    assert [row["sensor"] for row in rows] == ["north"] * 2
    assert [row["size"] for row in rows] == [40, 112]
    assert batch.flows["ts"].cast(pa.int64())[0].as_py() == 1_709_294_400_250_000


def test_argus_ports_and_bytes_of_the_source() -> None:
    head = (
        "StartTime,Dur,Proto,SrcAddr,Sport,Dir,DstAddr,Dport,State,TotPkts,TotBytes,SrcBytes,SrcPkts,Label\n"
    )
    text = head + (
        "2024/03/01 12:00:00.250000,0.1,tcp,1.2.3.4,40000,  <->,198.18.0.1,0x0017,S_SA,9,900,100,4,flow=x\n"
        "2024/03/01 12:00:01.000000,0.1,icmp,1.2.3.4,0x0d03,   ->,198.18.0.1,0x1234,URP,1,60,60,1,\n"
        "2024/03/01 12:00:01.000000,0.1,arp,1.2.3.4,,  who,198.18.0.1,,INT,1,60,60,1,\n"
    )
    _, batch = read(text.encode(), time_zone="UTC")
    assert batch.flows["dst_port"].to_pylist() == [23, 3]
    assert batch.flows["icmp_code"].to_pylist() == [None, 13]
    assert batch.flows["size"].to_pylist() == [100, 60]
    assert batch.flows["packets"].to_pylist() == [4, 1]
    assert batch.flows["label"].to_pylist() == ["flow=x", None]
    assert batch.rejects == [Reject("proto unreadable", 2, 1)]


def test_spoki_needs_no_settings() -> None:
    head = "ts|saddr|daddr|ipid|ttl|proto|sport|dport|anum|snum|options|syn|ack|rst|fin|probed\n"
    text = head + "1709294400307|1.2.3.4|198.18.0.1|54321|55|tcp|63019|22|0|7||1|1|0|0|true\n"
    _, batch = read(text.encode(), time_unit="s")
    (row,) = batch.flows.drop_columns(["ts"]).to_pylist()
    assert (row["tcp_flags"], row["ttl"], row["fingerprint"]) == (18, 55, 1)
    assert batch.flows["ts"].cast(pa.int64()).to_pylist() == [1_709_294_400_307_000]

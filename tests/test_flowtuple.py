"""FlowTuple files written by fastavro to the published layouts: every codec and spelling, damage, bounds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.captures import avro
from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError, SchemaError

T0 = 1_700_000_100
ARRAY = {"type": "array", "items": "long"}
GEO = dict.fromkeys(("maxmind_continent", "maxmind_country", "netacq_continent", "netacq_country"), "string")
V3 = (
    dict.fromkeys(("time", "src_ip", "dst_ip"), "long")
    | dict.fromkeys(("src_port", "dst_port", "protocol", "ttl", "tcp_flags", "ip_len"), "int")
    | dict.fromkeys(("tcp_synlen", "tcp_synwinlen"), "int")
    | {"packet_cnt": "long", "is_spoofed": "int", "is_masscan": "int", **GEO, "prefix2asn": "long"}
)
"""corsaro_flowtuple of CAIDA/corsaro3, with the fields in its order."""

COMMON = ("pktsize", "ttl", "srcport", "tcpflag")
V4 = (
    dict.fromkeys(("time", "src_ip", "dst_net"), "long")
    | {"dst_port": "int", "protocol": "int", "packet_cnt": "long"}
    | dict.fromkeys(
        ("uniq_dst_ips", "uniq_pkt_sizes", "uniq_ttls", "uniq_src_ports", "uniq_tcp_flags"), "int"
    )
    | dict.fromkeys(("first_syn_length", "first_tcp_rwin"), "int")
    | {f"common_{name}{end}": ARRAY for name in COMMON for end in ("s", "_freqs")}
    | {**GEO, "prefix2asn": "long"}
)
PYAVRO = {"time": "timestamp", "packet_cnt": "packets", "tcp_flags": "tcpflags", "prefix2asn": "asn"} | {
    "common_pktsizes": "common_pkt_sizes", "common_pktsize_freqs": "common_pkt_size_freqs",
    "common_srcports": "common_src_ports", "common_srcport_freqs": "common_src_port_freqs",
}  # fmt: skip

Record = dict[str, Any]


def blank(fields: dict[str, Any]) -> Record:
    return {name: [] if kind == ARRAY else "DE" if kind == "string" else 0 for name, kind in fields.items()}


def v3(**values: Any) -> Record:
    good = {
        "time": T0,
        "src_ip": 16_909_060,
        "dst_ip": 741_092_396,
        "src_port": 40_000,
        "dst_port": 23,
        "protocol": 6,
    }
    return blank(V3) | good | {"ttl": 240, "tcp_flags": 2, "ip_len": 44, "packet_cnt": 3} | values


def v4(**values: Any) -> Record:
    good = {
        "time": T0,
        "src_ip": 16_909_060,
        "dst_net": 738_197_504,
        "dst_port": 23,
        "protocol": 6,
        "packet_cnt": 5,
    }
    common = {"common_pktsizes": [40, 44], "common_pktsize_freqs": [2, 3], "common_ttls": [50, 240, 241]}
    common |= {"common_ttl_freqs": [1, 3, 1], "common_tcpflags": [2], "common_tcpflag_freqs": [5]}
    return blank(V4) | good | common | values


def container(
    fields: dict[str, Any], records: Iterable[Record], codec: str = "null", block_bytes: int = 16_000
) -> bytes:
    schema = {"type": "record", "namespace": "org.caida.corsaro", "name": "flowtuple"}
    schema["fields"] = [{"name": name, "type": kind} for name, kind in fields.items()]  # type: ignore[assignment]
    file = io.BytesIO()
    fastavro.writer(file, schema, records, codec=codec, sync_interval=block_bytes)
    return file.getvalue()


def parts_of(data: bytes, batch_rows: int = 1000, **more: object) -> tuple[str, Iterator[Batch]]:
    return read_capture(io.BytesIO(data), "some.avro", CapturesConfig(**more), batch_rows)


def read(data: bytes, batch_rows: int = 1000) -> tuple[str, Batch]:
    kind, batches = parts_of(data, batch_rows)
    parts = list(batches)
    assert all(part.flows.num_rows <= batch_rows for part in parts)
    flows = pa.concat_tables([BATCH.empty_table(), *(part.flows for part in parts)])
    return kind, Batch(flows, merge_rejects(reject for part in parts for reject in part.rejects))


def rows(batch: Batch) -> list[Record]:
    return batch.flows.set_column(0, "ts", batch.flows["ts"].cast(pa.int64())).to_pylist()


@pytest.mark.parametrize("codec", ["null", "deflate", "snappy"])
def test_version_3(codec: str) -> None:
    kind, batch = read(container(V3, [v3(), v3(is_masscan=1, is_spoofed=1)], codec))
    assert (kind, batch.rejects) == ("flowtuple3", [])
    expect = {
        "ts": T0 * 10**6, "src": 16_909_060, "dst": 741_092_396, "dst_port": 23, "proto": 6, "sensor": None,
        "src_port": 40_000, "ttl": 240, "size": 132, "packets": 3, "tcp_flags": 2, "icmp_code": None,
        "fingerprint": 0, "label": None,
    }  # fmt: skip
    assert rows(batch) == [expect, expect | {"fingerprint": 2}]


@pytest.mark.parametrize("codec", ["null", "deflate", "snappy"])
def test_version_4(codec: str) -> None:
    kind, batch = read(container(V4, [v4(), v4(packet_cnt=6, common_ttls=[], common_ttl_freqs=[])], codec))
    assert (kind, batch.rejects) == ("flowtuple4", [])
    expect = {
        "ts": T0 * 10**6, "src": 16_909_060, "dst": None, "dst_port": 23, "proto": 6, "sensor": None,
        "src_port": None, "ttl": 240, "size": 212, "packets": 5, "tcp_flags": 2, "icmp_code": None,
        "fingerprint": None, "label": None,
    }  # fmt: skip
    assert rows(batch) == [expect, expect | {"packets": 6, "ttl": None, "size": None}]


@pytest.mark.parametrize(("fields", "record"), [(V3, v3()), (V4, v4())])
def test_the_other_spelling(fields: dict[str, Any], record: Record) -> None:
    turned = {PYAVRO.get(name, name): kind for name, kind in fields.items()}
    again = {PYAVRO.get(name, name): value for name, value in record.items()}
    assert rows(read(container(turned, [again]))[1]) == rows(read(container(fields, [record]))[1])


def test_icmp() -> None:
    rows3 = rows(read(container(V3, [v3(protocol=1, src_port=3, dst_port=13)]))[1])
    rows4 = rows(read(container(V4, [v4(protocol=1, dst_port=3 << 8 | 13), v4(protocol=1, dst_port=0)]))[1])
    for row in (*rows3, rows4[0]):
        assert (row["dst_port"], row["icmp_code"], row["src_port"], row["tcp_flags"]) == (3, 13, None, None)
    assert rows4[1]["dst_port"] == 0


def test_optional_fields_may_be_absent_or_null() -> None:
    needed = ("time", "src_ip", "dst_ip", "dst_port", "protocol", "packet_cnt")
    fields = {name: V3[name] for name in needed}
    (row,) = rows(read(container(fields, [v3()]))[1])
    assert (row["dst"], row["ttl"], row["size"], row["fingerprint"]) == (741_092_396, None, None, None)
    nullable = fields | {
        "ttl": ["null", "int"],
        "common": ["null", ARRAY],
        "x": ["string", "null"],
        "y": "double",
    }
    records = [v3(ttl=None, common=None, x=None, y=1.5), v3(ttl=9, common=[1, 2], x="abc", y=0.0)]
    assert [row["ttl"] for row in rows(read(container(nullable, records))[1])] == [None, 9]
    for absent in ("time", "dst_ip", "packet_cnt"):
        rest = {name: kind for name, kind in fields.items() if name != absent}
        with pytest.raises((SchemaError, FormatError), match=r"are no FlowTuple|not supported yet"):
            read(container(rest, [v3()]))


def test_other_avro_files() -> None:
    with pytest.raises(FormatError, match="avro captures are not supported yet; convert it to one of"):
        read(container({"a": "long"}, [{"a": 1}]))
    with pytest.raises(SchemaError, match=r"Avro field 'm' has a type that is not supported"):
        read(container(V3 | {"m": {"type": "map", "values": "long"}}, []))
    with pytest.raises(SchemaError, match=r"some\.avro: Avro records of time, src_ip, .* are no FlowTuple"):
        read(container(V3 | {"src_ip": "string"}, []))
    assert read(container(V3, []))[1].flows.num_rows == 0


VALUES = {"long": st.integers(-(2**63), 2**63 - 1), "int": st.integers(-(2**31), 2**31 - 1)}


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 30), st.sampled_from([20, 200, 16_000]), st.sampled_from([1, 7, 1000]))
def test_numbers_agree_with_fastavro(data: st.DataObject, n: int, block_bytes: int, batch_rows: int) -> None:
    fields = {"a": "long", "s": "string", "l": ARRAY, "u": ["null", "long"], "b": "boolean", "i": "int"}
    values = st.fixed_dictionaries(
        {
            "a": VALUES["long"], "s": st.text(max_size=5), "l": st.lists(VALUES["long"], max_size=8),
            "u": st.none() | VALUES["long"], "b": st.booleans(), "i": VALUES["int"],
        }
    )  # fmt: skip
    records = data.draw(st.lists(values, min_size=n, max_size=n))
    file = io.BytesIO(container(fields, records, "deflate", block_bytes))
    header = avro.read_header(file, "f")
    parts = list(avro.read_rows(file, "f", header, ["a", "l", "u", "b", "i"], batch_rows))
    assert [part.first for part in parts] == list(range(0, n, batch_rows))
    for name in ("a", "u", "b", "i"):
        got = [value for part in parts for value in part.columns[name].tolist()]
        assert got == [avro.NULL if r[name] is None else int(r[name]) for r in records]
    lists = [value for part in parts for value in part.columns["l"].tolist()]
    assert lists == [(r["l"] + [avro.NULL] * 5)[:5] for r in records]


def blocks(n: int, codec: str) -> tuple[bytearray, list[int]]:
    """A file of n records in many blocks, and where each block's bytes begin."""
    data = container(V3, (v3(src_ip=k) for k in range(n)), codec, 600)
    file = io.BytesIO(data)
    mark = avro.read_header(file, "f").sync
    starts, place = [file.tell()], file.tell()
    while (place := data.find(mark, place) + len(mark)) < len(data):
        starts.append(place)
    return bytearray(data), starts


@pytest.mark.parametrize("codec", ["deflate", "snappy"])
def test_a_damaged_block_costs_itself(codec: str) -> None:
    data, starts = blocks(200, codec)
    assert len(starts) > 5
    middle = (starts[2] + starts[3]) // 2
    data[middle : middle + 6] = b"\xff" * 6
    _, batch = read(bytes(data))
    (reject,) = batch.rejects
    assert reject.reason == "damaged: Avro block"
    src = batch.flows["src"].to_pylist()
    assert len(src) + reject.count == 200
    assert src == [k for k in range(200) if not reject.offset <= k < reject.offset + reject.count]


def sources(data: bytes) -> list[int]:
    return [record["src_ip"] for block in whole_blocks(data) for record in block]


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_a_lost_mark_costs_the_blocks_beside_it(batch_rows: int) -> None:
    data, starts = blocks(200, "null")
    head, before, behind = data[: starts[0]], data[: starts[2]], data[starts[4] :]
    kept = [*sources(bytes(before)), *sources(bytes(head + behind))]
    data[starts[3] - 4] ^= 0xFF
    _, batch = read(bytes(data), batch_rows)
    assert batch.rejects == [Reject("damaged: Avro block", len(sources(bytes(before))), 1)]
    assert batch.flows["src"].to_pylist() == kept


@pytest.mark.parametrize("noise", [b"", b"\x02\x80\x80\x80\x3c", b"\xff" * 3000])
@pytest.mark.parametrize("piece", [16, 17, 100, 1 << 20])
def test_the_next_mark_is_found(noise: bytes, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the pieces end in which it is searched for. Without one, reading ends."""
    monkeypatch.setattr(avro, "_PIECE", piece)
    data, starts = blocks(200, "deflate")
    before, behind = bytes(data[: starts[2]]), bytes(data[starts[3] :])
    bad = before + noise + bytes(data[starts[2] + 1 : starts[3]])
    _, batch = read(bad + behind)
    assert batch.flows["src"].to_pylist() == [*sources(before), *sources(before[: starts[0]] + behind)]
    assert [reject.reason for reject in batch.rejects] == ["damaged: Avro block"]
    with pytest.raises(FormatError, match="damaged: Avro block"):
        read(bad[:-4])


def test_an_unknown_length_leaves_the_size_unknown() -> None:
    _, batch = read(container(V3 | {"ip_len": ["null", "int"]}, [v3(ip_len=None), v3(ip_len=44)]))
    assert batch.rejects == []
    assert batch.flows["size"].to_pylist() == [None, 132]


def whole_blocks(data: bytes) -> list[Any]:
    return list(fastavro.block_reader(io.BytesIO(data)))


def test_a_header_of_endless_empty_keys_is_refused() -> None:
    endless = b"Obj\x01" + b"\xfe\xff\xff\xff\x0f" + bytes(4 << 20)
    with pytest.raises(FormatError, match=r"damaged: Avro header"):
        list(parts_of(endless, format="flowtuple3")[1])


@pytest.mark.parametrize("cut", [5, 100, 0.4, 0.7, -1])
def test_truncated_files(cut: float) -> None:
    data, _ = blocks(300, "deflate")
    end = int(cut * len(data)) if isinstance(cut, float) else cut
    _, batches = parts_of(bytes(data[:end]), format="flowtuple3")
    flows = []
    with pytest.raises(FormatError, match=r"some\.avro.*damaged: Avro (header|block): "):
        for batch in batches:
            flows += batch.flows["src"].to_pylist()
    assert flows == list(range(len(flows)))


def test_a_flood_of_claims_is_not_copied() -> None:
    """Each of many blocks claims 40,010 bytes that are there, but no mark behind them."""

    class Counted(avro._Stream):
        copied = 0

        def read(self, size: int) -> bytes:
            piece = super().read(size)
            self.copied += len(piece)
            return piece

    mark = b"S" * 16
    data = (b"\x02\x94\xf1\x04" + mark) * 4000
    stream = Counted(io.BytesIO(data))
    header = avro.Header(("a",), np.zeros((3, 1), np.int64), "null", mark)
    assert sum(count for count, _ in avro._blocks(stream, header)) == 4000
    assert stream.copied < len(data)


@pytest.mark.parametrize(
    "kind",
    [["null", "int", "string"], ["int"], [], {"type": {"type": "int"}}, {"type": {"type": {}}}, "array",
     {"type": "array"}, {"type": []}, None, 7, "\ud800", ["null", ["null", "int"]], ["null", "null"]],
    ids=repr,
)  # fmt: skip
def test_types_that_are_not_read_are_named(kind: Any) -> None:
    with pytest.raises(SchemaError, match=r"Avro field .* has a type that is not supported"):
        list(parts_of(with_schema([{"name": "x\ud800", "type": kind}]))[1])


@pytest.mark.parametrize("fields", [7, [7], [None], [[]], {}, [{"name": "x"}], [{"type": "int"}], None])
def test_schemas_that_are_none(fields: Any) -> None:
    with pytest.raises((FormatError, SchemaError)):
        list(parts_of(with_schema(fields))[1])


def with_schema(fields: Any) -> bytes:
    """The header of a file, with the name of a FlowTuple's field in it."""
    schema = json.dumps({"type": "record", "name": "x", "dst_ip": 0, "fields": fields}).encode()
    size = bytes([2 * len(schema) & 127 | 128, 2 * len(schema) >> 7])
    return b"Obj\x01\x02\x16avro.schema" + size + schema + b"\x00" + b"S" * 16


def test_what_a_block_claims_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither counts nor sizes reserve memory, and a block that expands without end is lost."""
    data, starts = blocks(40, "null")
    head = bytes(data[: starts[0]])
    mark = avro.read_header(io.BytesIO(bytes(data)), "f").sync
    huge = b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    for block in (huge + b"\x02a", b"\x02" + huge + b"a", b"\xff" * 30):
        assert read(head + block + mark)[1].rejects == [Reject("damaged: Avro block", 0, 1)]
        with pytest.raises(FormatError, match="damaged: Avro block"):
            read(head + block)
    _, batch = read(head + b"\xd0\x0f\x02a" + mark)
    assert batch.rejects == [Reject("damaged: Avro block", 0, 1000)]
    monkeypatch.setattr(avro, "MAX_BLOCK_BYTES", 20_000)
    bomb = container(V3, [v3()] * 2000, "deflate", 10**6)
    assert read(bomb)[1].rejects == [Reject("damaged: Avro block", 0, 2000)]


def test_values_out_of_range_cost_their_rows() -> None:
    records = [v3(src_ip=2**32), v3(time=0), v3(protocol=300), v3(dst_port=-1), v3(ttl=400), v3()]
    _, batch = read(container(V3, records))
    assert batch.flows["ttl"].to_pylist() == [None, 240]
    assert sum(reject.count for reject in batch.rejects if reject.rows_lost) == 4


def test_batches_are_bounded() -> None:
    n = 500
    _, batches = parts_of(container(V4, [v4()] * n), 64)
    sizes = [batch.flows.num_rows for batch in batches]
    assert sum(sizes) == n
    assert max(sizes) == 64

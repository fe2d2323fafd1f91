"""EVE events of Suricata, and JSON lines that no known program wrote."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pytest

from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import SchemaError

FLOW = {
    "timestamp": "2024-03-01T13:05:00.000000+0100",
    "event_type": "flow",
    "src_ip": "1.2.3.4",
    "src_port": 40_000,
    "dest_ip": "198.18.0.1",
    "dest_port": 23,
    "proto": "TCP",
    "flow": {
        "pkts_toserver": 2,
        "pkts_toclient": 9,
        "bytes_toserver": 120,
        "start": "2024-03-01T13:00:00.25+0100",
    },
    "tcp": {"tcp_flags": "1f", "tcp_flags_ts": "12"},
    "host": "north",
}
ICMP = {k: v for k, v in FLOW.items() if k not in ("src_port", "dest_port", "tcp", "host")}
ICMP |= {"proto": "ICMP", "icmp_type": 3, "icmp_code": 1}


def read(*lines: Any, batch_rows: int = 1000, **settings: object) -> Batch:
    data = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    _, batches = read_capture(io.BytesIO(data), "eve.json", CapturesConfig(**settings), batch_rows)
    parts = list(batches)
    flows = pa.concat_tables([BATCH.empty_table(), *(part.flows for part in parts)])
    return Batch(flows, merge_rejects(reject for part in parts for reject in part.rejects))


def test_a_flow() -> None:
    batch = read(FLOW)
    assert batch.rejects == []
    (row,) = batch.flows.to_pylist()
    assert row.pop("ts").isoformat() == "2024-03-01T12:00:00.250000+00:00"
    assert row == {
        "src": 16_909_060, "dst": 3_323_068_417, "dst_port": 23, "proto": 6, "sensor": "north",
        "src_port": 40_000, "ttl": None, "size": 120, "packets": 2, "tcp_flags": 18, "icmp_code": None,
        "fingerprint": None, "label": None,
    }  # fmt: skip


def test_icmp() -> None:
    (row,) = read(ICMP, sensor="south").flows.to_pylist()
    assert (row["dst_port"], row["icmp_code"], row["tcp_flags"], row["sensor"]) == (3, 1, None, "south")
    (row,) = read(ICMP | {"proto": "047", "icmp_type": None}).flows.to_pylist()
    assert (row["dst_port"], row["proto"]) == (None, 47)


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
def test_other_events_are_skipped_and_counted(batch_rows: int) -> None:
    alert, stats, odd = ({"event_type": kind} for kind in ("alert", "stats", "odd"))
    batch = read(
        alert, FLOW, stats, alert, odd, {"a": 1}, FLOW, "{", FLOW | {"src_ip": "::1"}, batch_rows=batch_rows
    )
    assert batch.flows.num_rows == 2
    assert sorted(batch.rejects, key=lambda reject: reject.reason) == [
        Reject("IPv6 is not supported yet", 8, 1, "left out"),
        Reject("alert event, no flow", 0, 2, "left out"),
        Reject("not a JSON object", 7, 1),
        Reject("other event, no flow", 4, 2, "left out"),
        Reject("stats event, no flow", 2, 1, "left out"),
    ]


def test_objects_of_other_shapes() -> None:
    odd = [
        FLOW | {"flow": "x"},
        FLOW | {"flow": [1]},
        FLOW | {"tcp": 3},
        FLOW | {"src_port": "7"},
        FLOW | {"src_ip": 5},
    ]
    batch = read(*odd)
    assert batch.flows["src_port"].to_pylist() == [40_000, 7, 40_000]
    assert batch.rejects == [Reject("ts missing", 0, 2)]


def test_json_by_column_map() -> None:
    event = {"seen": "2024-03-01T12:00:00Z", "who": {"ip": "1.2.3.4"}, "Port": 23, "proto": "tcp", "ttl": 64}
    mapped = {"ts": "seen", "src": "who.ip"}
    batch = read(event, event | {"ttl": None, "more": 1}, columns=mapped)
    assert batch.rejects == []
    assert batch.flows.select(["src", "dst_port", "proto", "ttl"]).to_pylist() == [
        {"src": 16_909_060, "dst_port": 23, "proto": 6, "ttl": 64},
        {"src": 16_909_060, "dst_port": 23, "proto": 6, "ttl": None},
    ]
    with pytest.raises(
        SchemaError, match=r"eve\.json: no column found for ts, src among seen, who\.ip, Port"
    ):
        read(event)


def test_numbers_keep_their_digits() -> None:
    event = {"ts": 1, "src": 16_909_060, "dst_port": 23, "proto": 6}
    lines = [
        json.dumps(event).replace('"ts": 1', f'"ts": {ts}') for ts in ("1709294400.307123", "1709294400")
    ]
    batch = read(*lines, "{", time_unit="s")  # both parsers: the second line by line
    again = read(*lines, time_unit="s")
    assert batch.flows.equals(again.flows)
    assert batch.flows["ts"].cast(pa.int64()).to_pylist() == [1_709_294_400_307_123, 1_709_294_400_000_000]

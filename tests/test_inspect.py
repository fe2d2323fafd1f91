"""`rayscan inspect`: every figure against the rows themselves, in bounded memory, without a workspace."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from rayscan.captures.columns import BATCH, Batch, Reject
from rayscan.captures.detect import READERS
from rayscan.captures.inspection import OTHERS, Distinct, Inspection, Tally
from rayscan.cli import main


def rayscan(*words: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *words], catch_exceptions=False)


def facts(*words: str) -> dict[str, Any]:
    result = rayscan(*words, "--json")
    return {**json.loads(result.stdout), "code": result.exit_code}


def traffic(n: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "ts": pl.Series(1_704_067_200_000_000 + rng.permutation(n)).cast(pl.Datetime("us", "UTC")),
            "src": rng.integers(2**24, 2**24 + n // 3, n),
            "dst": rng.integers(2**24, 2**24 + 256, n),
            "dst_port": rng.choice([22, 23, 80, 443], n, p=[0.5, 0.3, 0.15, 0.05]),
            "proto": rng.choice([6, 17], n, p=[0.9, 0.1]),
            "ttl": pl.Series(rng.integers(32, 255, n)).set(pl.Series(rng.random(n) < 0.25), None),
            "label": [("censys", "shodan", None)[i] for i in rng.integers(0, 3, n)],
            "zmap": rng.random(n) < 0.4,
        }
    )


def test_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = traffic(5000)
    rows.write_parquet(tmp_path / "a.parquet", row_group_size=700)
    found = facts(str(tmp_path / "a.parquet"), "--set", "ingest.batch_rows=512")
    assert found["code"] == 0
    (one,) = found["captures"]
    assert {**one, "path": ""} == {**found["together"], "path": ""}
    assert (one["format"], one["compression"], one["flows"]) == ("parquet", None, 5000)
    assert one["first"] == "2024-01-01T00:00:00+00:00" and one["last"] == "2024-01-01T00:00:00.004999+00:00"
    assert one["backwards"] == (rows["ts"].diff().dt.total_microseconds() < 0).sum()
    assert one["sources"] == {"count": rows["src"].n_unique(), "exact": True}
    assert one["destinations"] == {"count": rows["dst"].n_unique(), "exact": True}
    ports = Counter(zip(rows["proto"], rows["dst_port"], strict=True))
    assert {(p["proto"], p["port"]): p["flows"] for p in one["ports"]} == ports
    assert [p["flows"] for p in one["ports"]] == sorted(ports.values(), reverse=True)
    assert {p["proto"]: p["share"] for p in one["protocols"]} == {
        proto: (rows["proto"] == proto).mean() for proto in (6, 17)
    }
    assert one["columns"]["ttl"] == 1 - rows["ttl"].null_count() / 5000
    assert one["labels"] == {name: (rows["label"] == name).sum() for name in one["labels"]}
    assert one["fingerprints"] == {"zmap": rows["zmap"].mean(), "masscan": 0, "mirai": 0}
    assert set(one["missing"]) == {"sensor", "src_port", "size", "packets", "tcp_flags", "icmp_code"}
    assert one["missing"]["tcp_flags"] == "a model cannot use the input tcp_flags"


def test_labels_are_shown_as_they_are(tmp_path: Path) -> None:
    """No emoji, no colour, no backslash that was not there, no way to move the cursor."""
    rows = traffic(4).with_columns(label=pl.Series([":bomb: \\", "[red]", "[/x]", "a\x1b[1Ab\nc"]))
    rows.write_parquet(tmp_path / ":boom:.parquet")
    text = rayscan(str(tmp_path / ":boom:.parquet")).stdout
    for said in (":boom:.parquet", ":bomb: \\ 1", "[red] 1", "[/x] 1", "a [1Ab c 1"):
        assert said in text


def test_several_captures_add_up(tmp_path: Path) -> None:
    """Also where they are told by a pattern, compressed, or not to be read at all."""
    parts = [traffic(900, seed=seed) for seed in (1, 2)]
    parts[0].write_parquet(tmp_path / "a.parquet")
    text = parts[1].with_columns(pl.col("ts").dt.epoch("us")).write_csv().encode()
    (tmp_path / "b.gz").write_bytes(gzip.compress(text))
    words = ["--set", "captures.time_unit=us"]
    found = facts(f"{tmp_path}/[ab].*", *words)
    assert found["code"] == 0
    assert [one["compression"] for one in found["captures"]] == [None, "gzip"]
    both = pl.concat(parts)
    total = found["together"]
    assert (total["flows"], total["sources"]["count"]) == (1800, both["src"].n_unique())
    assert sum(p["flows"] for p in total["ports"]) == 1800
    assert total["labels"] == {name: (both["label"] == name).sum() for name in total["labels"]}
    (tmp_path / "noise").write_bytes(bytes(50))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text)[:5000])
    found = facts(str(tmp_path), *words)
    assert found["code"] == 3
    ended = {Path(one["path"]).name: one["ended"] for one in found["captures"]}
    assert ended["a.parquet"] is ended["b.gz"] is None
    assert "not a capture in a known format" in ended["noise"] and "damaged: gzip" in ended["cut.gz"]
    assert 0 < found["captures"][2]["flows"] < 900
    shown = rayscan(str(tmp_path), *words).stdout
    assert "noise: not read: not a capture" in shown and "cut.gz: not read to the end: damaged" in shown
    assert "all 4 captures" in shown and "label" in shown


def test_early_stop_is_said(tmp_path: Path) -> None:
    traffic(5000).write_parquet(tmp_path / "a.parquet")
    (one,) = facts(str(tmp_path), "--rows", "1000")["captures"]
    assert one["stopped"] and one["flows"] == 1000
    assert "stopped early: the rest was not looked at" in rayscan(str(tmp_path), "--rows", "1000").stdout
    assert not facts(str(tmp_path), "--rows", "5001")["captures"][0]["stopped"]


def test_rejects_and_text_from_files(tmp_path: Path) -> None:
    (tmp_path / "[red]a").write_text(
        "ts,src,dst_port,proto,label\n1704067200,1.2.3.4,23,6,[bold]x\n1704067200,::1,23,6,y\n1,2,3\n"
    )
    result = rayscan(str(tmp_path / "[red]a"), "--set", "captures.time_unit=s")
    assert result.exit_code == 3
    shown = " ".join(result.stdout.split())
    assert "[red]a format csv, 88 bytes" in shown and "[bold]x 1" in shown
    assert "rejected 1 of 3 rows wrong number of fields: 1, first at 2" in shown
    assert "left out 1 of 3 rows IPv6 is not supported yet: 1, first at 1" in shown


def test_what_ingest_leaves_out(tmp_path: Path) -> None:
    sources = ("8.8.8.8", "10.0.0.1", "10.0.0.2", "9.9.9.1")
    rows = [f"2024-01-01T00:00:00Z,{src},9.9.9.9,23,6\n" for src in sources]
    (tmp_path / "a.csv").write_text("ts,src,dst,dst_port,proto\n" + "".join(rows))
    (one,) = facts(str(tmp_path), "--set", "captures.telescope=9.9.9.0/24")["captures"]
    assert (one["flows"], one["sources"]["count"]) == (1, 1)
    reasons = {reject["reason"]: reject["count"] for reject in one["rejects"]}
    assert reasons == {"source in 10.0.0.0/8, private (RFC 1918)": 2, "source in the telescope itself": 1}


@pytest.mark.timeout(60)
def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to("/proc/self/mem")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to("/nowhere")
    found = facts(str(tmp_path))
    assert [one["ended"] for one in found["captures"]] == [
        "cannot be read: Input/output error",
        "neither a file nor a folder, but a pipe, socket or device",
        "cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("addresses", ["raw", "cryptopan"])
def test_a_reader_that_fails_does_not_take_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: str
) -> None:
    def fail(*_: object) -> Iterator[Batch]:
        raise KeyError("192.0.2.7")
        yield

    monkeypatch.setitem(READERS, "csv", fail)
    (tmp_path / "a.csv").write_text("ts,src\n1,2\n")
    traffic(10).write_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text('{"\\ud800": 1}\n')
    found = facts(str(tmp_path), "--set", f"ingest.addresses={addresses}")["captures"]
    shown = ": '192.0.2.7'" if addresses == "raw" else ""
    assert found[0]["ended"] == f"reader failed: KeyError{shown}"
    assert (found[0]["format"], found[1]["flows"]) == ("csv", 10)
    assert "no column found" in found[2]["ended"]


def test_distinct_is_exact_then_close() -> None:
    counter = Distinct(most=4096)
    rng = np.random.default_rng(3)
    counter.add(np.repeat(np.arange(4000), 3))
    counter.add(np.arange(2000, 4096))
    assert (counter.exact, counter.count) == (True, 4096)
    other = Distinct(most=4096)
    for _ in range(20):
        other.add(rng.integers(0, 300_000, 50_000))
    assert not other.exact
    counter.merge(other)
    seen = 300_000 * (1 - (1 - 1 / 300_000) ** 1_000_000)
    assert abs(counter.count / seen - 1) < 5 / np.sqrt(4094)  # five standard errors; seeded


def test_tallies_add_up() -> None:
    rng = np.random.default_rng(4)
    values = rng.integers(0, 100, 5000)
    whole, halves, other = Tally(), Tally(), Tally()
    whole.add(values)
    halves.add(values[:2500])
    other.add(values[2500:])
    halves.merge(other)
    assert halves.most(200) == whole.most(200)
    assert dict(whole.most(200)) == Counter(values.tolist())


def test_memory_is_bounded_by_names_too() -> None:
    """A label of its own for every flow does not fill the memory."""
    inspection = Inspection()
    rows = {name: pa.nulls(6000, BATCH.field(name).type) for name in BATCH.names}
    for part in range(2):
        rows |= {
            "ts": pa.array([part] * 6000, BATCH.field("ts").type),
            "src": pa.array([1] * 6000, pa.int64()),
            "proto": pa.array([6] * 6000, pa.int16()),
            "label": pa.array([f"{part} {i}" for i in range(6000)]),
        }
        inspection.add(Batch(pa.table(rows, schema=BATCH), [Reject("x", part, 2)]))
    assert len(inspection.labels) == 10_001
    assert inspection.labels[OTHERS] == 2000
    assert (inspection.rows, inspection.destinations.count) == (12_004, 0)
    assert inspection.facts(3)["ports"] == [{"proto": 6, "port": None, "flows": 12_000, "share": 1.0}]

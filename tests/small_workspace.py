"""A whole workspace in seconds and without Ray: two months of the report's example, in known clusters."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from report_example import GROUPS, telescope

from rayscan import schema
from rayscan.clustering.campaigns import Campaigns, follow
from rayscan.clustering.objective import cluster_sums
from rayscan.config import IngestConfig
from rayscan.keys import bucket_of
from rayscan.report import summarise
from rayscan.tables import CommitInfo, Workspace

MONTH_US = 31 * 86_400_000_000
PERIODS = ("2024-03", "2024-04")
NETWORK = 0xC6336400  # 198.51.100.0/24, where every source of the first group is
BUCKETS = 2
THRESHOLD = 0.5
ABSENT = (3, 5)  # the group that is missing in each month: one is born in April, one gone
MERGED = len(GROUPS)  # in March some sources of the first group are a campaign of their own, in April no more


def small_workspace(path: Path, addresses: str = "raw") -> Workspace:
    workspace = Workspace.open(path, IngestConfig(n_buckets=BUCKETS, addresses=addresses))
    before = Campaigns.none()
    for month, period in enumerate(PERIODS):
        sequences, clusters, group = _month(month)
        vectors = _vectors(group, month)
        for bucket in range(BUCKETS):
            key = {"period": period, "bucket": bucket, "model": "m"}
            rows = np.flatnonzero(bucket_of(sequences["src"].to_numpy(), BUCKETS) == bucket)
            _append(workspace, "sequences", sequences.take(rows), key)
            _append(workspace, "flows", _flows(sequences.take(rows)), key)
            embedded = sequences.select(["sequence_id", "src", "start"]).append_column("vector", vectors)
            _append(workspace, "embeddings", embedded.take(rows), key)
        key = {"run": "main", "period": period}
        _append(workspace, "clusters", clusters, key)
        campaigns, before = _campaigns(sequences, clusters, vectors, period, before)
        _append(workspace, "campaigns", campaigns, key)
    reject = {
        "capture": "c",
        "path": "march.pcap",
        "offset": 7,
        "reason": "IPv6",
        "count": 3,
        "lost": "left out",
    }
    _append(workspace, "rejects", pa.Table.from_pylist([reject], schema.REJECTS), {})
    read = {"capture": "c", "path": "march.pcap", "bytes": 9, "format": "pcap", "flows": 9, "left_out": 3}
    read |= {"rejects": 0, "duplicates": 0}
    _append(workspace, "captures", pa.Table.from_pylist([read], schema.CAPTURES), {})
    return workspace


def _append(workspace: Workspace, table: str, rows: pa.Table, key: dict[str, str | int]) -> None:
    target = workspace.table(table)
    target.append([target.write(rows, key)], {}, CommitInfo("test", ""))


def _month(month: int) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Sequences, their clusters (numbered without gaps), and the group each sequence is of."""
    sequences, clusters = telescope(0)
    group = clusters["cluster"].to_numpy()
    src = np.where(group == 0, NETWORK + sequences["src"].to_numpy() % 200, sequences["src"].to_numpy())
    if month == 0:
        group = np.where((group == 0) & (src % 8 == 1), MERGED, group)
    src[group == 2] = src[group == 1][: (group == 2).sum()]  # they do both
    kept = np.flatnonzero(group != ABSENT[month])
    shift = pa.scalar(month * MONTH_US, pa.duration("us"))
    columns = {
        **{name: sequences[name] for name in sequences.column_names},
        "sequence_id": pa.array(sequences["sequence_id"].to_numpy() + 10_000 * month),
        "src": pa.array(src),
        **{name: pc.add(sequences[name], shift) for name in ("start", "end")},
    }
    weights = clusters["weight_own"].take(kept)
    found = {
        "sequence_id": columns["sequence_id"].take(pa.array(kept)),
        "src": src[kept],
        "cluster": np.unique(group[kept], return_inverse=True)[1],
        "weight_own": weights,
        "weight_next": pc.multiply(weights, 0.95),
    }
    kept_rows = pa.table(columns, schema=schema.SEQUENCES).take(kept)
    return kept_rows, pa.table(found, schema=schema.CLUSTERS), group[kept]


def _vectors(group: np.ndarray, month: int) -> pa.Array:
    """Unit vectors around a direction for each group, the same in both months."""
    middles = np.random.default_rng(0).standard_normal((group.max() + 1, 32))
    middles[MERGED] += middles[0]
    vectors = middles[group] + 0.3 * np.random.default_rng(month).standard_normal((len(group), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32()))


def _flows(sequences: pa.Table) -> pa.Table:
    rows = []
    for row in sequences.to_pylist():
        times = row["start"].timestamp() + np.cumsum(row["gap_us"]) / 1e6
        for i, at in enumerate(times):
            rows.append(
                {
                    "ts": datetime.fromtimestamp(at, UTC), "src": row["src"], "dst": row["dst"][i],
                    "dst_port": row["dst_port"][i], "proto": row["proto"][i], "capture": "c",
                    "fingerprint": 4 if row["mirai"] else 1 if row["zmap"] else 0, "label": row["label"],
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema.FLOWS)


def _campaigns(
    sequences: pa.Table, clusters: pa.Table, vectors: pa.Array, period: str, before: Campaigns
) -> tuple[pa.Table, Campaigns]:
    summary = summarise(sequences, clusters, period).to_pylist()
    label = clusters["cluster"].to_numpy()
    sums, sizes = cluster_sums(np.stack(vectors.to_numpy(zero_copy_only=False)), label, len(summary))
    keys = np.array([clusters["sequence_id"].to_numpy()[label == c].min() for c in range(len(summary))])
    step = follow(before, period, keys, sums, sizes, THRESHOLD)
    rows = [
        {
            **row, "campaign": step.names[j], "event": step.events[j], "relative": step.parents[j],
            "began": row["first"], "feature_sum": sums[j], "size": int(sizes[j]), "absent": 0,
        }
        for j, row in enumerate(summary)
    ]  # fmt: skip
    nothing = dict.fromkeys(("sequences", "sources", "networks", "flows", "labelled"), 0)
    began = min(row["first"] for row in summary)
    rows += [
        {
            **nothing, "campaign": ended.name, "event": ended.event, "relative": ended.into, "began": began,
            "feature_sum": sums[0], "size": 2, "absent": 1,
        }
        for ended in step.ended
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema.CAMPAIGNS), Campaigns(step.names, sums, sizes)

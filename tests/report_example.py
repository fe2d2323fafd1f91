"""Sequences, clusters and a whole report from a few lines of chance: what the report's tests look at."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from rayscan import schema
from rayscan.clustering.calibration import Calibration
from rayscan.report import ReportData, activity, details, summarise
from rayscan.report.data import CAMPAIGNS, NEAR, POINTS

HOUR_US = 3_600_000_000
START_US = 1_709_251_200_000_000  # 2024-03-01
NASTY = (
    "<script>window.broken=1</script>",
    '"><img src=x onerror="window.broken=1">',
    "two\nlines ’quoted’ \"twice\" & 🦀 {{ 7*7 }} %{x} <a href='http://evil.example'>click</a>",
    "</script><!--<script>",
)
GROUPS = (  # sources, sequences of each, ports, label, flows per hour
    (60, 4, (23, 2323), "mirai-like", 60),
    (24, 6, (443, 8443), "census.example", 20),
    (9, 12, (22,), None, 200),
    (14, 3, (53, 123, 161), "dns-survey.example", 6),
    (5, 5, (8080, 80, 81, 8888, 8000, 9000), None, 30),
    (3, 8, (5060,), "voip.example", 12),
)


def lists(values: list[list[int]], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


def sequence(sequence_id: int, src: int, **more: Any) -> dict[str, Any]:
    """One row of schema.SEQUENCES; the flow lists give its length."""
    row: dict[str, Any] = {"dst_port": [23, 23], "proto": [6, 6], "dst": [1, 2], "gap_us": [0, 10], **more}
    start = row.pop("start", START_US)
    times = {"start": start, "end": start + sum(row["gap_us"])}
    base = dict.fromkeys(schema.SEQUENCES.names) | {"index": 0, "sequences": 1, "length": len(row["gap_us"])}
    return base | {"sequence_id": sequence_id, "src": src} | times | row


def sequence_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.SEQUENCES)


def cluster_table(ids: list[int], clusters: list[int], weights: list[float] | None = None) -> pa.Table:
    columns = {
        "sequence_id": ids,
        "src": [0] * len(ids),
        "cluster": clusters,
        "weight_own": weights or [0.5] * len(ids),
        "weight_next": pa.nulls(len(ids), pa.float64()),
    }
    return pa.table(columns, schema=schema.CLUSTERS)


def telescope(seed: int, labels: tuple[str | None, ...] = ()) -> tuple[pa.Table, pa.Table]:
    """Sequences of GROUPS and some lone ones, and their true clusters. `labels` replace those of GROUPS."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    cluster: list[int] = []
    for number, (sources, each, ports, label, rate) in enumerate(GROUPS):
        name = labels[number] if number < len(labels) else label
        for src in rng.integers(1 << 24, 223 << 24, sources):
            for index in range(each):
                rows.append(_random_sequence(rng, len(rows), int(src), index, ports, rate, name))
                cluster.append(number)
    for src in rng.integers(1 << 24, 223 << 24, 40):
        rows.append(_random_sequence(rng, len(rows), int(src), 0, tuple(rng.integers(1, 65536, 9)), 1, None))
        cluster.append(len(GROUPS) + len(rows))
    weight = (np.bincount(cluster)[cluster] - 1) * rng.uniform(0.2, 0.5, len(rows))
    return sequence_table(rows), cluster_table(list(range(len(rows))), cluster, weight.tolist())


def _random_sequence(
    rng: np.random.Generator, number: int, src: int, index: int, ports: tuple[int, ...], rate: int, label: Any
) -> dict[str, Any]:
    n = int(rng.integers(16, 65))
    gaps = rng.exponential(HOUR_US / rate, n).astype(np.int64)
    gaps[0] = 0
    return sequence(
        number,
        src,
        start=START_US + int(rng.integers(0, 27 * 24)) * HOUR_US,
        index=index,
        dst=rng.integers(10 << 24, (10 << 24) + 65536, n).tolist(),
        dst_port=rng.choice(ports, n).tolist(),
        proto=[17 if {53, 5060} & set(ports) else 6] * n,
        gap_us=gaps.tolist(),
        zmap=float(443 in ports),
        mirai=float(rng.uniform(0.9, 1)) if 23 in ports else 0.0,
        label=label,
    )


def figure(value: float | None, width: float = 0.01) -> dict[str, Any]:
    bounds = (None, None) if value is None else (value - width, min(value + width, 1.0))
    return {"value": value, "low": bounds[0], "high": bounds[1], "n": 0 if value is None else 80}


def histograms(rng: np.random.Generator, same: float, different: float) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 65)
    counts = [
        np.histogram(np.clip(rng.normal(mean, 0.22, n), -1, 1), edges)[0].tolist()
        for mean, n in ((same, 4_000), (different, 90_000))
    ]
    return {"edges": edges.tolist(), "same": counts[0], "different": counts[1]}


def evaluation(model: float = 0.982, ports: float = 0.867, seed: int = 0) -> dict[str, Any]:
    """An evaluation in layout version 1 with a given AUROC of model and port floor on unseen sources."""
    rng = np.random.default_rng(seed)
    scores = {"model": model, "ports": ports, "random": 0.503}
    methods = {
        name: {
            "n_sequences": 900,
            "n_sources": 80,
            "pairs_same": 4_000,
            "pairs_different": 90_000,
            "auroc": figure(value),
            "average_precision": figure(value - 0.2),
            "r_at_1": figure(value - 0.3, 0.03),
            "r_at_1_macro": figure(value - 0.35, 0.04),
            "mean_same": figure(0.7),
            "mean_different": figure(0.05),
            "histograms": histograms(rng, 0.75 if name == "model" else 0.3, 0.02),
        }
        for name, value in scores.items()
    }
    by_label = {
        name: {**item, "knn_macro_f1": {k: figure(scores[name] - 0.1) for k in "1357"}}
        for name, item in methods.items()
    }
    labels = {
        "sequences": 400,
        "sources": 50,
        "names": [{"label": "mirai-like", "sources": 30, "sequences": 200}],
        "left_out": {"labels": 2, "sequences": 9},
        "unlabelled": 491,
        "methods": by_label,
        "across_networks": {
            name: {**item, "auroc": figure(scores[name] - 0.05)} for name, item in by_label.items()
        },
    }
    part = {
        "sequences": 900,
        "sources": 80,
        "available": {"sequences": 1_400, "sources": 80},
        "methods": methods,
        "labels": labels,
        "histograms": methods["model"]["histograms"],
    }
    join = {"precision": 0.91, "recall": 0.42, "f1": 0.57, "joined": 900, "together": 2_000, "both": 820}
    agreement = {
        "sequences": 900,
        "groups": 80,
        "ari": 0.55,
        "ami": 0.71,
        "homogeneity": 0.9,
        "completeness": 0.6,
        "v_measure": 0.72,
        "join": join,
        "join_across_sources": join,
        "intervals": {
            "ari": [0.56, 0.6],  # sources drawn again may all lie above
            "v_measure": [0.7, 0.74],
            "join": {"precision": [0.9, 0.92], "recall": None, "f1": [0.5, 0.6]},
            "join_across_sources": {"precision": [0.9, 0.92], "recall": None, "f1": [0.4, 0.7]},
        },
    }
    period = {"sequences": 900, "sources": 80, "clusters": 46, "singletons": 40, "largest": 240}
    return {
        "version": 1,
        "made_from": "1",
        "model": "0a1b2c3d4e5f6071",
        "config_hash": "0123456789abcdef",
        "settings": {},
        "parts": {"unseen sequences": {**part, "labels": None}, "unseen sources": part},
        "clusters": {"periods": {"2024-03": {**period, "by_source": agreement, "by_label": agreement}}},
        "not_computed": [{"what": "validation / labels", "why": "no label has 5 sources or more"}],
    }


def seeds() -> dict[str, Any]:
    """Figures over three seeds; of one row only two seeds have them."""

    def spread(mean: float, n: int = 3) -> dict[str, Any]:
        return {"mean": mean, "deviation": 0.004, "low": mean - 0.005, "high": mean + 0.005, "n": n}

    rows = [
        {"part": "unseen sources", "by": "source", "auroc": spread(0.981), "r_at_1": spread(0.66)},
        {"part": "unseen sources", "by": "label", "auroc": spread(0.91, 2), "knn_macro_f1@5": spread(0.8, 2)},
    ]
    return {"seeds": [0, 1, 2], "config_hash": "0123456789abcdef", "rows": rows}


def captures(n: int, flows: int, rejects: int) -> tuple[pa.Table, pa.Table]:
    """`n` captures that share the flows and rejects, one of which nothing was read, and all rejects."""
    first = datetime(2024, 3, 1, tzinfo=UTC)
    read = {
        "capture": [*(f"{i:016x}" for i in range(n)), "f" * 16],
        "path": [
            *(f"telescope/2024-03-{i + 1:02d}.pcap.gz" for i in range(n)),
            "telescope/2024-03-29.pcap.gz",
        ],
        "bytes": [48_000_000 + 1_000_000 * i for i in range(n + 1)],
        "modified": [first] * (n + 1),
        "format": ["pcap"] * n + ["unknown"],
        "flows": [flows // n] * n + [0],
        "rejects": [rejects // n] * n + [0],
        "left_out": [40] * n + [0],
        "duplicates": [3] * n + [0],
        "first": [first] * n + [None],
        "last": [first.replace(day=28)] * n + [None],
    }
    refused = {
        "capture": read["capture"],
        "path": read["path"],
        "offset": [1_234_567] * n + [None],
        "reason": ["IPv6 is not read yet"] * n + ["truncated gzip stream"],
        "count": [rejects // n] * n + [1],
        "lost": ["rows"] * n + ["file"],
    }
    return pa.table(read, schema=schema.CAPTURES), pa.table(refused, schema=schema.REJECTS)


def training(steps: int = 400) -> pa.Table:
    rng = np.random.default_rng(0)
    step = np.arange(0, steps, 5)
    separation = [0.9 - 0.5 * np.exp(-s / 120) if s % 50 == 0 else None for s in step]
    columns = {
        "step": step,
        "loss": 5.5 * np.exp(-step / 90) + 0.8 + rng.normal(0, 0.06, len(step)),
        "learning_rate": np.cos(step / steps * np.pi / 2) * 1e-3,
        "separation": pa.array(separation, pa.float64()),
    }
    return pa.table(columns)


def points(sequences: pa.Table, clusters: pa.Table, period: str) -> pa.Table:
    rng = np.random.default_rng(1)
    cluster = clusters["cluster"].to_numpy()
    angle = (cluster % 7) * 2 * np.pi / 7 + (cluster > 6) * cluster
    columns = {
        "x": np.cos(angle) + rng.normal(0, 0.13, len(cluster)),
        "y": np.sin(angle) + rng.normal(0, 0.13, len(cluster)),
        "period": [period] * len(cluster),
        "cluster": cluster,
        "src": sequences["src"],
        "start": sequences["start"],
        "label": sequences["label"],
        "scanner": pa.nulls(len(cluster), pa.string()),
        "port": pa.array([ports[0] for ports in sequences["dst_port"].to_pylist()], pa.int32()),
        "strange": [False] * len(cluster),
    }
    return pa.table(columns, schema=POINTS)


def campaigns(summary: pa.Table, event: str = "born") -> pa.Table:
    """Rows of the campaigns table, as many as clusters, all of one event; named after their clusters."""
    rows = [
        {
            **row,
            "campaign": f"2024-03-{0x1000000 * (row['cluster'] + 1):x}",
            "event": event,
            "began": row["first"],
            "size": row["sequences"],
            "absent": 0,
        }
        for row in summary.to_pylist()
    ]
    return pa.Table.from_pylist(rows, CAMPAIGNS)


def near(clusters: list[int], period: str) -> pa.Table:
    """Every cluster beside the next two."""
    n = len(clusters)
    pairs = [(clusters[(i + 1) % n], clusters[(i + 2) % n]) for i in range(n)]
    found = [[{"cluster": c, "similarity": 0.3 - 0.1 * at} for at, c in enumerate(two)] for two in pairs]
    return pa.table({"period": [period] * n, "cluster": clusters, "near": found}, schema=NEAR)


def example(labels: tuple[str | None, ...] = (), **more: Any) -> ReportData:
    """A full report on one month; `more` replaces fields."""
    period = "2024-03"
    sequences, clusters = telescope(0, labels)
    flows = sum(sequences["length"].to_pylist())
    read, refused = captures(6, flows + 3_000, 240)
    bins = [
        {"predicted": p, "observed": p + 0.05 * np.sin(6 * p), "pairs": int(9_000 * (1 - p) ** 2) + 90}
        for p in np.linspace(0.05, 0.95, 10)
    ]
    calibration = asdict(Calibration(0.42, 9.0, -3.8, 0.5, 4_000, 20_000, 0.031, bins))
    fields: dict[str, Any] = {
        "title": "Telescope north, March 2024",
        "generated": datetime(2024, 4, 2, 9, 30, tzinfo=UTC),
        "run": "main",
        "config_yaml": "run: main\ntrain:\n  steps: 400\n",
        "config_hash": "0123456789abcdef",
        "versions": {"rayscan": "0.1.0", "python": "3.11.2"},
        "captures": read,
        "rejects": refused,
        "periods": pa.table(
            {
                "period": [period],
                "flows": [flows + 3_000],
                "sources": [400],
                "sequences": [sequences.num_rows],
                "dropped_flows": [3_000],
            }
        ),
        "campaigns": campaigns(summarise(sequences, clusters, period)),
        "activity": activity(sequences, clusters, period, top=100),
        "details": details(sequences, clusters, period, 100),
        "near": near(list(range(len(GROUPS))), period),
        "model": "0a1b2c3d4e5f6071",
        "weights": "feedfacecafebeef",
        "evaluation": evaluation(),
        "seeds": seeds(),
        "training": training(),
        "threshold": {"value": 0.42, "how": "auto", "calibration": calibration},
        "points": points(sequences, clusters, period),
    }
    return ReportData(**(fields | more))

"""What the report is made of: the tables that tasks describe periods with, and all that the page is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa

from rayscan import schema
from rayscan.report.details import DETAILS, NEIGHBOUR
from rayscan.report.summary import ACTIVITY, DAY_US, SUMMARY

PERIODS = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("flows", pa.int64(), nullable=False),
        pa.field("sources", pa.int64(), nullable=False),  # distinct, of all flows
        pa.field("sequences", pa.int64(), nullable=False),
        pa.field("dropped_flows", pa.int64(), nullable=False),  # in no sequence
    ]
)
CAMPAIGNS = pa.schema(
    [
        *SUMMARY,
        *(
            schema.CAMPAIGNS.field(name)
            for name in ("campaign", "event", "relative", "began", "size", "absent")
        ),
    ]
)
NEAR = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),
        pa.field("near", pa.list_(NEIGHBOUR), nullable=False),
    ]
)
POINTS = pa.schema(
    [
        pa.field("x", pa.float32()),
        pa.field("y", pa.float32()),
        pa.field("period", pa.string(), nullable=False),
        pa.field("cluster", pa.int64()),  # null: not clustered
        pa.field("src", pa.int64(), nullable=False),
        pa.field("start", schema.TIME, nullable=False),
        pa.field("label", pa.string()),
        pa.field("scanner", pa.string()),  # the organisation that a list of known scanners names
        pa.field("port", pa.int32()),  # where most of its flows go
        pa.field("strange", pa.bool_()),  # like nothing that the map was drawn from
    ]
)
TRAINING = ["step", "loss", "separation"]
TABLES = {
    "captures": schema.CAPTURES.names,
    "rejects": schema.REJECTS.names,
    "periods": PERIODS.names,
    "campaigns": CAMPAIGNS.names,
    "activity": ACTIVITY.names,
    "details": DETAILS.names,
    "near": NEAR.names,
    "training": TRAINING,
    "points": POINTS.names,
}


@dataclass(frozen=True)
class ReportData:
    """What the page is made of. Tables may have no rows; None means that the part was never made."""

    title: str
    generated: datetime  # with a time zone
    run: str
    config_yaml: str
    config_hash: str
    versions: dict[str, str]
    captures: pa.Table  # schema.CAPTURES
    rejects: pa.Table  # schema.REJECTS
    periods: pa.Table  # PERIODS
    campaigns: pa.Table  # CAMPAIGNS, also of earlier periods than those shown
    activity: pa.Table  # summary.ACTIVITY
    details: pa.Table  # details.DETAILS
    near: pa.Table  # NEAR
    model: str = ""  # its id
    weights: str = ""  # their hash
    evaluation: dict[str, Any] | None = None  # as rayscan.evaluation writes it, version 1
    misfit: str = ""  # a sentence, where the evaluation is not of this model and these clusters
    comparison: dict[str, Any] | None = None  # of methods, as stages.compare writes it
    seeds: dict[str, Any] | None = None  # figures over seeds, as pipeline.evaluate_seeds writes them
    training: pa.Table | None = None  # step, loss, separation (nullable)
    # value (similarity), how ("auto" or "given"), calibration: None or the fields of a Calibration
    threshold: dict[str, Any] = field(default_factory=dict)
    points: pa.Table | None = None  # POINTS
    drawn_from: list[str] = field(default_factory=list)  # the periods that the map was drawn from
    step_us: int = DAY_US  # of the activity
    show_sources: bool = True
    max_clusters: int = 5_000
    # list, source, networks, organisations, valid_from, valid_to; None: addresses are pseudonyms
    lists: pa.Table | None = field(default_factory=lambda: pa.table({"list": []}))
    tolerance_days: int = 0  # outside an entry's dates on which it counted
    origins: dict[str, pa.Table] = field(default_factory=dict)  # by title: period, cluster, names (of LABEL)

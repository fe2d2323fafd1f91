"""How campaigns went over the periods: what changed since the one before, and who was there when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EVENTS = ("born", "grown", "continued", "shrunk", "split", "merged", "gone")
LETTERS = 4

GROWN, SHRUNK, LEAST = 1.5, 0.5, 10
"""A campaign that goes on has grown if it has GROWN times the sources it had or more, and shrunk if it has
SHRUNK times these or fewer, where that makes LEAST more or fewer. Small numbers change by chance."""


@dataclass(frozen=True)
class Line:
    """A campaign over the periods: its row of `with_change` for each, or None where it has none."""

    campaign: str
    cells: list[dict[str, Any] | None]


def with_change(campaigns: pa.Table) -> pa.Table:
    """Rows of the campaigns table with columns `sources_before`, `paused` and `became`.

    `sources_before` are the campaign's sources when it last had a cluster, null if it never had one before;
    `paused` is true where that was not in the period just before; `became` is the event, or one of EVENTS
    that says more of how a campaign continued.
    """
    periods = {name: at for at, name in enumerate(campaigns["period"].unique().sort().to_pylist())}
    columns = [campaigns[name].to_pylist() for name in ("period", "campaign", "cluster", "sources")]
    rows = sorted(range(campaigns.num_rows), key=lambda i: periods[columns[0][i]])
    last: dict[str, tuple[int, int]] = {}  # campaign -> period and sources of its last cluster
    before: list[int | None] = [None] * len(rows)
    paused = [False] * len(rows)
    for i in rows:
        period, campaign, cluster, sources = (column[i] for column in columns)
        if campaign in last:
            at, before[i] = last[campaign]
            paused[i] = cluster is not None and at < periods[period] - 1
        if cluster is not None:
            last[campaign] = periods[period], sources
    became = [
        _continued(old, now) if event == "continued" else event
        for event, old, now in zip(campaigns["event"].to_pylist(), before, columns[3], strict=True)
    ]
    table = campaigns.append_column("sources_before", pa.array(before, pa.int64()))
    table = table.append_column("paused", pa.array(paused, pa.bool_()))
    return table.append_column("became", pa.array(became, pa.string()))


def _continued(before: int | None, now: int) -> str:
    if before is None or abs(now - before) < LEAST:
        return "continued"
    return "grown" if now >= GROWN * before else "shrunk" if now <= SHRUNK * before else "continued"


def short_names(campaigns: pa.Table) -> dict[str, str]:
    """Each campaign's name cut to so many letters of its number that all of the table stay apart."""
    names = campaigns["campaign"].unique().to_pylist()
    split = [name.rpartition("-") for name in names]
    longest = max((len(number) for _, _, number in split), default=LETTERS)
    for letters in range(LETTERS, longest + 1):
        cut = [f"{period}-{number[:letters]}" for period, _, number in split]
        if len(set(cut)) == len(cut):
            return dict(zip(names, cut, strict=True))
    return {name: name for name in names}


def events(campaigns: pa.Table) -> list[dict[str, Any]]:
    """For each period, in order, how many campaigns of two sequences or more met each of EVENTS in it.

    `campaigns` as `with_change` gives it.
    """
    fresh = pc.and_(pc.less_equal(campaigns["absent"], 1), pc.greater(campaigns["size"], 1))
    counted = campaigns.filter(fresh).group_by(["period", "became"]).aggregate([([], "count_all")])
    found = {(row["period"], row["became"]): row["count_all"] for row in counted.to_pylist()}
    periods = campaigns["period"].unique().sort().to_pylist()
    return [
        {"period": period, **{event: found.get((period, event), 0) for event in EVENTS}} for period in periods
    ]


def timeline(campaigns: pa.Table, periods: list[str], limit: int) -> list[Line]:
    """The `limit` campaigns with the most sources in any of these periods, and their cells.

    The oldest come first, and of one age the largest. `campaigns` as `with_change` gives it.
    """
    inside = campaigns.filter(pc.is_in(campaigns["period"], value_set=pa.array(periods, pa.string())))
    peaks = inside.filter(pc.greater(inside["size"], 1)).group_by("campaign").aggregate([("sources", "max")])
    order = peaks.sort_by([("sources_max", "descending"), ("campaign", "ascending")])
    chosen = order["campaign"].slice(0, limit)
    rows = inside.filter(pc.is_in(inside["campaign"], value_set=chosen.combine_chunks()))
    wanted = ["period", "campaign", "cluster", "event", "became", "relative"]
    wanted += ["sources", "sources_before", "paused"]
    cells: dict[str, list[dict[str, Any] | None]]
    cells = {name: [None] * len(periods) for name in chosen.to_pylist()}  # in order of size
    for row in rows.select([*wanted, "absent"]).to_pylist():
        if row["absent"] <= 1:
            cells[row["campaign"]][periods.index(row["period"])] = row
    lines = [Line(name, found) for name, found in cells.items()]
    return sorted(lines, key=_first)  # stable: of those that begin together the largest first


def _first(line: Line) -> int:
    """The position of the first period in which a campaign is on the table."""
    return next((at for at, cell in enumerate(line.cells) if cell is not None), len(line.cells))

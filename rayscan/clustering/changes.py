"""What changed in the campaigns of a period, against its own last state or the period before.

A period that is still going on is clustered again and again. Its campaigns are matched to those of its last
state by the rule that carries them from period to period (`campaigns.follow`): so a campaign whose name has
moved, because earlier flows of it came in late, shows as renamed and not as one gone and one born.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayscan.clustering.campaigns import Campaigns, follow

Row = dict[str, Any]
"""A campaign of a period as in the campaigns table; `cluster` is None where it has none in the period."""
Changes = dict[str, Any]
"""Lists of campaigns by what happened (KINDS), and the number that are `unchanged`."""

KINDS = ("born", "grown", "shrunk", "split", "merged", "gone", "renamed")


def since_last_state(old: Sequence[Row], new: Sequence[Row], threshold: float) -> Changes:
    """Two states of one period, with feature sums of the same model, at the threshold of its clusters."""
    before, after = _alive(old), _alive(new)
    changes = _none()
    now = _campaigns(after)
    step = follow(_campaigns(before), "new", np.arange(len(after)), now.sums, now.sizes, threshold)
    known = {row["campaign"]: row for row in before}
    for row, name, event, parent in zip(after, step.names, step.events, step.parents, strict=True):
        if event == "continued":
            _compare(changes, known[name], row)
        else:
            changes[event].append(_fact(row, **({"from": parent} if parent else {})))
    names = dict(zip(step.names, now.names, strict=True))
    for ended in step.ended:
        into = {} if ended.into is None else {"into": names[ended.into]}
        changes[ended.event].append(_fact(known[ended.name], **into))
    return changes


def since_period_before(before: Sequence[Row], new: Sequence[Row]) -> Changes:
    """A period that is there for the first time: its own events, and the sizes of the period before."""
    changes = _none()
    known = {row["campaign"]: row for row in _alive(before)}
    for row in new:
        relative = {} if row["relative"] is None else {"from": row["relative"]}
        match row["event"]:
            case "continued" if row["campaign"] in known:
                _compare(changes, known[row["campaign"]], row)
            case "continued":  # it comes back after a pause
                changes["grown"].append(_fact(row, sources_before=0))
            case "born" | "split":
                changes[row["event"]].append(_fact(row, **relative))
            case _ if row["campaign"] in known:  # merged or gone now, not in a period before
                into = {} if row["relative"] is None else {"into": row["relative"]}
                changes[row["event"]].append(_fact(known[row["campaign"]], **into))
    return changes


def _none() -> Changes:
    return {**{kind: [] for kind in KINDS}, "unchanged": 0}


def _alive(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["cluster"] is not None]


def _campaigns(rows: list[Row]) -> Campaigns:
    if not rows:
        return Campaigns.none()
    sums = np.array([row["feature_sum"] for row in rows])
    return Campaigns([row["campaign"] for row in rows], sums, np.array([float(row["size"]) for row in rows]))


def _compare(changes: Changes, old: Row, new: Row) -> None:
    if old["campaign"] != new["campaign"]:
        changes["renamed"].append(_fact(new, **{"from": old["campaign"]}))
    if new["sources"] != old["sources"]:
        kind = "grown" if new["sources"] > old["sources"] else "shrunk"
        changes[kind].append(_fact(new, sources_before=old["sources"]))
    elif old["campaign"] == new["campaign"]:
        changes["unchanged"] += 1


def _fact(row: Row, **more: Any) -> dict[str, Any]:
    facts = {name: row[name] for name in ("campaign", "sources", "sequences", "flows")}
    return {**facts, "ports": row["ports"], **more}

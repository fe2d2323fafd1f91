"""What changed between two states of a period, or from one period to the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayscan.clustering.changes import KINDS, since_last_state, since_period_before

AXES = np.eye(6)


def row(
    name: str, axis: int, sources: int, event: str = "born", relative: str | None = None
) -> dict[str, Any]:
    """A campaign of as many equal vectors as sources; with 0 sources one that has no cluster any more."""
    return {
        "campaign": name, "event": event, "relative": relative, "cluster": axis if sources else None,
        "sources": sources, "sequences": sources, "flows": 10 * sources, "ports": [], "size": sources or 4,
        "feature_sum": (sources or 4) * AXES[axis],
    }  # fmt: skip


def told(changes: dict[str, Any]) -> dict[str, list[str]]:
    return {kind: [fact["campaign"] for fact in changes[kind]] for kind in KINDS if changes[kind]}


def test_states_of_one_period() -> None:
    old = [row("same", 0, 3), row("up", 1, 3), row("down", 2, 3), row("old name", 3, 3), row("ends", 4, 3)]
    new = [row("same", 0, 3), row("up", 1, 5), row("down", 2, 2), row("new name", 3, 3), row("begins", 5, 2)]
    changes = since_last_state(old, new, 0.5)
    assert told(changes) == {
        "born": ["begins"], "grown": ["up"], "shrunk": ["down"], "gone": ["ends"], "renamed": ["new name"],
    }  # fmt: skip
    assert changes["unchanged"] == 1
    assert changes["renamed"][0]["from"] == "old name"
    assert (changes["grown"][0]["sources_before"], changes["grown"][0]["sources"]) == (3, 5)


def test_one_falls_apart_and_two_become_one() -> None:
    whole, parts = [row("a", 0, 6)], [row("a", 0, 4), row("b", 0, 2)]
    split = since_last_state(whole, parts, 0.5)
    assert told(split) == {"shrunk": ["a"], "split": ["b"]}
    assert split["split"][0]["from"] == "a"
    merged = since_last_state(parts, whole, 0.5)
    assert told(merged) == {"grown": ["a"], "merged": ["b"]}
    assert merged["merged"][0]["into"] == "a"


def test_the_same_state_twice_and_none_at_all() -> None:
    rows = [row("a", 0, 3), row("b", 1, 4), row("c", 2, 0, "gone")]
    same = since_last_state(rows, rows, 0.4)
    assert told(same) == {} and same["unchanged"] == 2
    assert told(since_last_state([], rows, 0.4)) == {"born": ["a", "b"]}
    assert told(since_last_state(rows, [], 0.4)) == {"gone": ["a", "b"]}


def test_a_new_period_tells_its_own_events() -> None:
    before = [row("a", 0, 3), row("b", 1, 3), row("c", 2, 3), row("d", 3, 3), row("paused", 4, 0, "gone")]
    new = [
        row("a", 0, 5, "continued"), row("b", 1, 3, "continued"), row("e", 0, 2, "split", "a"),
        row("c", 2, 0, "merged", "a"), row("d", 3, 0, "gone"), row("f", 5, 1),
        row("paused", 4, 2, "continued"), row("long gone", 5, 0, "gone"),
    ]  # fmt: skip
    changes = since_period_before(before, new)
    assert told(changes) == {
        "born": ["f"], "grown": ["a", "paused"], "split": ["e"], "merged": ["c"], "gone": ["d"]
    }  # fmt: skip
    assert changes["unchanged"] == 1
    assert (changes["split"][0]["from"], changes["merged"][0]["into"]) == ("a", "a")

"""Tables of sequences for tests, written down flow by flow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayscan.methods.method import Embedded
from rayscan.schema import SEQUENCE_LISTS, SEQUENCES

HOUR_US = 3_600_000_000


def sequences_of(
    rows: Sequence[Sequence[dict[str, int]]],
    src: Sequence[int] | None = None,
    start_us: Sequence[int] | None = None,
    labels: Sequence[str | None] | None = None,
) -> pa.Table:
    """A table of `schema.SEQUENCES`. A flow is {"dst", "port", "proto", "gap"}, by default 1, 80, 6 and 0;
    sources are 0, 1, ... and all begin at time 0, unless given. What else there is is not recorded."""
    n = len(rows)
    keys = np.arange(n) if src is None else np.asarray(src)
    start = np.zeros(n, np.int64) if start_us is None else np.asarray(start_us, np.int64)
    lists = {
        "dst": [[flow.get("dst", 1) for flow in row] for row in rows],
        "dst_port": [[flow.get("port", 80) for flow in row] for row in rows],
        "proto": [[flow.get("proto", 6) for flow in row] for row in rows],
        "gap_us": [[flow.get("gap", 0) for flow in row] for row in rows],
    }
    before: dict[int, int] = {}
    index = []
    for key in keys.tolist():
        index.append(before.setdefault(key, 0))
        before[key] += 1
    columns = {
        "sequence_id": np.arange(n),
        "src": keys,
        "index": index,
        "sequences": [before[key] for key in keys.tolist()],
        "start": start,
        "end": start + [sum(gaps) for gaps in lists["gap_us"]],
        "length": [len(row) for row in rows],
        "label": [None] * n if labels is None else list(labels),
        **{name: [None] * n for name in SEQUENCE_LISTS},
        **lists,
    }
    return pa.Table.from_arrays(
        [pa.array(columns.get(name, [None] * n), SEQUENCES.field(name).type) for name in SEQUENCES.names],
        schema=SEQUENCES,
    )


def bits(found: Embedded) -> list[bytes]:
    """What has to be equal for vectors to be the same."""
    return [column.tobytes() for column in found]

"""Records of packets -> batches of flows. What every packet format has in common."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from rayscan.captures.aggregate import Aggregator
from rayscan.captures.columns import BATCH, Batch, Reject, time_limits
from rayscan.captures.fingerprints import fingerprints
from rayscan.captures.headers import (
    COLUMNS,
    DST,
    DST_PORT,
    FINGERPRINT,
    IP_ID,
    LEFT_OUT,
    PROTO,
    REACH,
    REASONS,
    TCP_SEQ,
    decode,
)
from rayscan.captures.records import Records
from rayscan.captures.values import Ints
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError
from rayscan.schema import MISSING


def flows_of(records: Iterator[Records], config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Batches of at most `batch_rows` flows. Offsets of rejects are bytes in the file.

    A FormatError of `records` is raised after the flows before it.
    """
    before = np.full((len(COLUMNS), REACH), MISSING, np.int64)  # the last packets
    aggregator = Aggregator(config.aggregate) if config.aggregate is not None else None
    damage = None
    try:
        for part in records:
            if part.rejects:
                yield Batch(BATCH.empty_table(), part.rejects)
            for first in range(0, part.table.shape[1], batch_rows):
                some = part._replace(table=part.table[:, first : first + batch_rows])
                packets, rejects, duplicates = _read(some, config, before)
                flows = packets if aggregator is None else aggregator.add(packets)
                yield Batch(_table(flows[:, :batch_rows], config.sensor), rejects, duplicates)
                yield from _batches(flows[:, batch_rows:], config.sensor, batch_rows)
    except FormatError as error:
        damage = error
    if aggregator is not None:
        yield from _batches(aggregator.rest(), config.sensor, batch_rows)
    if damage is not None:
        raise damage


def _read(part: Records, config: CapturesConfig, before: Ints) -> tuple[Ints, list[Reject], int]:
    """Columns of the packets that are flows, (len(COLUMNS), N), the others by reason, and duplicates.

    `before` (len(COLUMNS), REACH) holds the last packets and is brought up to date.
    """
    columns = np.empty((len(COLUMNS), REACH + part.table.shape[1]), np.int64)
    columns[:, :REACH] = before
    lost = np.zeros((2, len(REASONS)), np.int64)
    drop = config.duplicates == "drop"
    kept, duplicates = decode(part.data, part.table, *time_limits(config), drop, columns, lost)
    before[:] = columns[:, kept : kept + REACH]
    columns = columns[:, REACH : REACH + kept]
    bits, _ = fingerprints(*(columns[k] for k in (PROTO, DST, DST_PORT, IP_ID, TCP_SEQ)))
    columns[FINGERPRINT] = bits
    rejects = [
        Reject(reason, part.offset + int(place), int(count), "left out" if reason in LEFT_OUT else "rows")
        for reason, count, place in zip(REASONS, *lost, strict=True)
        if count
    ]
    return columns, rejects, duplicates


def _batches(flows: Ints, sensor: str | None, batch_rows: int) -> Iterator[Batch]:
    for first in range(0, flows.shape[1], batch_rows):
        yield Batch(_table(flows[:, first : first + batch_rows], sensor), [])


def _table(flows: Ints, sensor: str | None) -> pa.Table:
    n = flows.shape[1]
    arrays = {
        "sensor": pa.nulls(n, pa.string()) if sensor is None else pa.repeat(sensor, n),
        "label": pa.nulls(n, pa.string()),
    }
    for name, values in zip(COLUMNS, flows, strict=True):
        if name in BATCH.names:
            missing = values == MISSING
            array = pa.array(values, mask=missing) if missing.any() else pa.array(values)
            arrays[name] = array.cast(BATCH.field(name).type, safe=False)
    return pa.Table.from_arrays([arrays[name] for name in BATCH.names], schema=BATCH)

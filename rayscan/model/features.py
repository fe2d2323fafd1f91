"""Sequences as contiguous arrays, and the padded tensors an encoder is fed with.

`Sequences` holds the flows of many sequences end to end, one array per column, with offsets: what Arrow's
list columns are inside, so that reading a table copies nothing and no sequence ever becomes a Python object.
`collate` gathers any rows of it into one padded batch with a handful of array operations.

Padding is known from lengths alone, never from a value: protocol 0, port 0 and address 0.0.0.0 are honest
values of a flow. Times stay int64 microseconds until a difference has been taken. What a flow does not
record is `schema.MISSING` (-1) here and a zero vector in the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from rayscan.config import ModelConfig
from rayscan.errors import DataError, ModelError, SchemaError
from rayscan.schema import MISSING

GAP_UNIT_S = 1e-3
"""τ0 of log1p(gap / τ0): gaps far below a millisecond count as none, longer ones by their ratio."""
GAP_CENTRE = 7.0  # log1p(1 s / τ0): a gap of one second becomes about 0 ...
GAP_SPREAD = 4.0  # ... and those from 18 ms to a minute fall within ±1

COLUMN_OF = {"gap": "gap_us"}
"""Column of the sequences table behind an input, where the names differ."""

LIMITS = {
    "dst": 2**32,
    "dst_port": 2**16,
    "proto": 2**8,
    "ttl": 2**8,
    "tcp_flags": 2**15,
    "src_port": 2**16,
    "icmp_code": 2**8,
}
"""Values of a column lie in [-1, limit); columns not named are not negative (gap_us) or may be -1 (size)."""


@dataclass(frozen=True)
class Sequences:
    """N sequences with F flows in all.

    offsets      int64 (N + 1,): the flows of sequence i are offsets[i]:offsets[i + 1], at least one
    src          int64 (N,), address
    index        int32 (N,), position among the sequences of its source and period
    sequences    int32 (N,), how many the source has in that period
    sequence_id  int64 (N,)
    start        int64 (N,), microseconds UTC of the first flow
    columns      per-flow columns by their name in the table, each (F,); -1 where not recorded
    """

    offsets: NDArray[np.int64]
    src: NDArray[np.int64]
    index: NDArray[np.int32]
    sequences: NDArray[np.int32]
    sequence_id: NDArray[np.int64]
    start: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.integer]]

    def __len__(self) -> int:
        return len(self.src)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Flows of each sequence, (N,)."""
        return np.diff(self.offsets)

    @classmethod
    def from_table(cls, table: pa.Table, inputs: Iterable[str]) -> Sequences:
        """The sequences of a table of `schema.SEQUENCES`, with the per-flow columns that `inputs` need.

        Arrays are views of the table's memory where Arrow allows it. Raises ModelError if an input is not
        recorded for some sequence, SchemaError if a column is absent or a list does not have `length`
        entries, DataError if a value is out of range.
        """
        lengths = _scalars(table, "length").astype(np.int64)
        if len(lengths) and lengths.min() < 1:
            raise DataError(f"{int((lengths < 1).sum())} sequences have no flow; build the sequences anew")
        columns = {column: _flows(table, column, lengths) for column in map(_column, inputs)}
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            src=_scalars(table, "src"),
            index=_scalars(table, "index"),
            sequences=_scalars(table, "sequences"),
            sequence_id=_scalars(table, "sequence_id"),
            start=_scalars(table, "start"),
            columns=columns,
        )

    def take(self, rows: NDArray[np.integer]) -> Sequences:
        """The named rows, in that order, as a copy."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flows = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Sequences(
            offsets,
            self.src[rows],
            self.index[rows],
            self.sequences[rows],
            self.sequence_id[rows],
            self.start[rows],
            {name: values[flows] for name, values in self.columns.items()},
        )


def concat(parts: Iterable[Sequences]) -> Sequences:
    """All sequences of `parts`, which is not empty and agrees on the columns, in order."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([p.lengths for p in parts])
    return Sequences(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        src=np.concatenate([p.src for p in parts]),
        index=np.concatenate([p.index for p in parts]),
        sequences=np.concatenate([p.sequences for p in parts]),
        sequence_id=np.concatenate([p.sequence_id for p in parts]),
        start=np.concatenate([p.start for p in parts]),
        columns={name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
    )


def collate(sequences: Sequences, rows: NDArray[np.integer], config: ModelConfig) -> dict[str, torch.Tensor]:
    """One padded batch of the named rows: B sequences, as long as the longest of them, L.

    Returns a tensor [B, L] for each of `config.inputs` (int64 as recorded, -1 where missing; `gap` float32,
    see `gap_feature`) and `mask`, bool [B, L], True where there is a flow. Padding, on the right, holds 0.
    """
    lengths = sequences.offsets[rows + 1] - sequences.offsets[rows]
    position = np.arange(lengths.max())
    mask = position < lengths[:, None]
    flows = np.minimum(sequences.offsets[rows][:, None] + position, sequences.offsets[-1] - 1)
    batch = {"mask": torch.from_numpy(mask)}
    for name in config.inputs:
        values = np.where(mask, sequences.columns[_column(name)][flows].astype(np.int64), 0)
        if name == "gap":
            values = gap_feature(values, sequences.start[rows], config) * mask
        batch[name] = torch.from_numpy(values)
    return batch


def gap_feature(
    gap_us: NDArray[np.int64], start_us: NDArray[np.int64], config: ModelConfig
) -> NDArray[np.float32]:
    """What the encoder sees of time, float32 (B, L).

    `gap_us` (B, L) holds the microseconds since the flow before, 0 for the first; `start_us` (B,) the time
    of the first. With time = "int64" the result is (log1p(gap / τ0) − centre) / spread. With "float32" it is
    log1p of the difference in microseconds of epoch times that were rounded to float32 first: today these
    lie 134 s apart, so most gaps come out as 0. That is what the published code computes.
    """
    if config.time == "int64":
        scaled = np.log1p(gap_us / (GAP_UNIT_S * 1e6))
        return ((scaled - GAP_CENTRE) / GAP_SPREAD).astype(np.float32)
    time = (start_us[:, None] + np.cumsum(gap_us, axis=1)).astype(np.float32)
    return np.log1p(np.diff(time, axis=1, prepend=time[:, :1]))


def columns_for(inputs: Iterable[str]) -> list[str]:
    """Columns of the sequences table that `Sequences.from_table` needs for these inputs."""
    scalars = ["sequence_id", "src", "index", "sequences", "start", "length"]
    return scalars + [_column(name) for name in inputs]


def _column(name: str) -> str:
    return COLUMN_OF.get(name, name)


def _scalars(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of one number per sequence; times become int64 microseconds."""
    column = _existing(table, name)
    if column.null_count:
        raise SchemaError(f"sequences: {column.null_count} rows have no {name}")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64())
    return np.asarray(column.to_numpy())


def _existing(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise SchemaError(f"sequences: column {name} is absent; there are {', '.join(table.column_names)}")
    return table[name]


def _flows(table: pa.Table, name: str, lengths: NDArray[np.int64]) -> NDArray[np.integer]:
    """The values of a list column end to end, checked."""
    column = _existing(table, name)
    if column.null_count:
        raise ModelError(
            f"the model needs {name}, but {column.null_count} of {len(column)} sequences do not record it; "
            "use captures that do, or a model trained without this input (model.inputs)"
        )
    if not np.array_equal(pc.list_value_length(column).to_numpy(), lengths):
        raise SchemaError(f"sequences: lists of {name} do not have as many entries as length says")
    chunks = [chunk.flatten() for chunk in column.chunks]
    if any(chunk.null_count for chunk in chunks):
        raise SchemaError(f"sequences: nulls inside the lists of {name}; unrecorded values are {MISSING}")
    flat = [chunk.to_numpy(zero_copy_only=True) for chunk in chunks] or [np.zeros(0, np.int64)]
    values: NDArray[np.integer] = flat[0] if len(flat) == 1 else np.concatenate(flat)
    _check_range(name, values)
    return values


def _check_range(name: str, values: NDArray[np.integer]) -> None:
    if not len(values):
        return
    low = 0 if name == "gap_us" else MISSING
    high = LIMITS.get(name, 2**62)
    if values.min() < low or values.max() >= high:
        raise DataError(
            f"sequences: {name} has values from {values.min()} to {values.max()}, "
            f"outside [{low}, {high}); build the sequences anew"
        )

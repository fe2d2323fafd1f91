"""JSON lines (an object on each line) -> Arrow columns of strings, block by block.

polars parses a block at once, about five times as fast as the standard library. A block in which it finds
fault is read again line by line, so that a line that is no object costs only itself. Numbers become the text
they were written as, or one that stands for the same number.

A table of objects that no known program wrote is read by the same names and column map as CSV. Its columns
are those of its first objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.captures.columns import BATCH, Batch, Converter, Reject, resolve
from rayscan.captures.delimited import block_bytes, read_lines
from rayscan.captures.values import plain
from rayscan.config import CapturesConfig

Path = tuple[str, ...]
"""Where a value stands: its key, or the key of an object and the key inside it."""

NO_OBJECT = "not a JSON object"
_FIRST = 1000  # objects that are asked for their keys


@dataclass(frozen=True)
class Objects:
    """The objects of some lines. Numbers of lines count from 0, without blank ones."""

    columns: dict[str, pa.Array]  # strings; null where an object has no such value
    rows: NDArray[np.int64]  # number of each object's line
    bad: NDArray[np.int64]  # numbers of the lines that are no object

    @property
    def rejects(self) -> list[Reject]:
        return [Reject(NO_OBJECT, int(self.bad[0]), len(self.bad))] if len(self.bad) else []


def read_objects(file: BinaryIO, path: str, keys: Mapping[str, Path], batch_rows: int) -> Iterator[Objects]:
    """The values at `keys` of the objects of a buffered file, at most `batch_rows` objects at a time.

    Raises FormatError, after the objects before it, where the file is damaged or a line exceeds 16 MiB.
    """
    row = 0
    for text in read_lines(file, path, block_bytes(batch_rows, 256, 8)):
        count = text.count(b"\n")
        columns, bad = _parse(text, count, keys)
        rows = np.setdiff1d(np.arange(count), bad, assume_unique=True)
        for start in range(0, max(len(rows), 1), batch_rows):
            part = slice(start, start + batch_rows)
            yield Objects({key: c[part] for key, c in columns.items()}, row + rows[part], row + bad)
            bad = bad[:0]
        row += count


def _parse(
    text: bytes, count: int, keys: Mapping[str, Path]
) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
    try:
        frame = pl.read_ndjson(text, schema=_schema(keys))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return _line_by_line(text, keys)
    if frame.height != count:
        return _line_by_line(text, keys)
    columns = {}
    for key, path in keys.items():
        series = frame[path[0]] if len(path) == 1 else frame[path[0]].struct.field(path[1])
        columns[key] = plain(series.to_arrow())
    return columns, np.zeros(0, np.int64)


def _schema(keys: Mapping[str, Path]) -> dict[str, pl.DataType]:
    fields: dict[str, list[str]] = {}
    for outer, *inner in keys.values():
        fields.setdefault(outer, []).extend(inner)
    return {
        outer: pl.Struct({name: pl.String() for name in inner}) if inner else pl.String()
        for outer, inner in fields.items()
    }


def _line_by_line(text: bytes, keys: Mapping[str, Path]) -> tuple[dict[str, pa.Array], NDArray[np.int64]]:
    good: dict[str, list[str | None]] = {key: [] for key in keys}
    bad = []
    for number, line in enumerate(text.decode().removesuffix("\n").split("\n")):
        found = _object(line)
        if found is None:
            bad.append(number)
            continue
        for key, path in keys.items():
            good[key].append(_text(found, path))
    columns = {key: pa.array(values, pa.string()) for key, values in good.items()}
    return columns, np.array(bad, np.int64)


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line, parse_int=str, parse_float=str)
        line.encode()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(found: Any, path: Path) -> str | None:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    if found is None or isinstance(found, str):
        return _valid(found)
    return _valid(json.dumps(found))


def _valid(text: str | None) -> str | None:
    """Without the halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    return None if text is None else text.encode(errors="replace").decode()


# ---------------------------------------------------------------------------------------------
# Tables of unknown origin
# ---------------------------------------------------------------------------------------------


def read_json(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of JSON lines with an object for each, whose keys are column names; `a.b` is the b in object a.

    Rows are numbered from 0, without blank lines. Raises SchemaError where the first 1,000 objects lack a
    column that flows need, ConfigError for a column map or zone that does not exist, FormatError for damage.
    """
    names = _names(file)
    places = resolve(list(names), config.columns, path)
    found = {key: list(names)[place] for key, place in places.items()}
    converter = Converter(path, found, config)
    for objects in read_objects(file, path, {key: names[name] for key, name in found.items()}, batch_rows):
        if objects.rejects:
            yield Batch(BATCH.empty_table(), objects.rejects)
        if len(objects.rows):
            yield converter.convert(objects.columns, objects.rows)


def _names(file: BinaryIO) -> dict[str, Path]:
    """Keys of the first objects that UTF-8 can hold, those of objects inside them too; the file stays where
    it is."""
    names: dict[str, Path] = {}
    for line in file.peek(1).decode("utf-8-sig", "replace").split("\n")[:_FIRST]:  # type: ignore[attr-defined]
        for key, value in (_object(line) or {}).items():
            if _valid(key) != key:
                continue
            names.setdefault(key, (key,))
            if isinstance(value, dict):
                names.pop(key)
                names |= {f"{key}.{inner}": (key, inner) for inner in value if _valid(inner) == inner}
    return names

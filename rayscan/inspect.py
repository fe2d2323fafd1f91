"""What captures hold and how they are read, before anything is ingested: `rayscan inspect`.

Reads like ingest does, with the same settings, in this process and without a workspace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
from rich.table import Table

from rayscan import terminal
from rayscan.captures.detect import read_capture, reader_failed
from rayscan.captures.inspection import Inspection
from rayscan.captures.outside import Outside
from rayscan.captures.source import compression_of
from rayscan.config import RunConfig
from rayscan.errors import FormatError, RayscanError, why
from rayscan.planning import PIPE, CaptureFile
from rayscan.report import words
from rayscan.storage import filesystem
from rayscan.terminal import lines, one_line

TOP = 10


@dataclass
class Inspected:
    """One capture, or several together."""

    path: str
    bytes: int
    format: str = "unknown"
    compression: str | None = None
    found: Inspection = field(default_factory=Inspection)
    stopped: bool = False  # after as many rows as were asked for
    ended: str | None = None  # why nothing was read, or nothing more
    offset: int | None = None  # where that was

    @property
    def whole(self) -> bool:
        """Whether every row that was looked at could be read."""
        return self.ended is None and all(reject.lost == "left out" for reject in self.found.rejects)

    def facts(self, top: int = TOP) -> dict[str, Any]:
        names = ("path", "bytes", "format", "compression", "stopped", "ended", "offset")
        return {**{name: getattr(self, name) for name in names}, **self.found.facts(top)}


def inspect(files: list[CaptureFile], config: RunConfig, rows: int | None) -> Iterator[Inspected]:
    """Read file after file, each to its end or for about `rows` rows. A bad file raises nothing."""
    for file in files:
        result = Inspected(file.path, file.bytes)
        try:
            _read(result, config, rows)
        except FormatError as error:
            result.ended, result.offset = error.reason, error.offset
        except RayscanError as error:  # the file does not fit the settings
            result.ended = str(error).removeprefix(f"{file.path}: ")
        except OSError as error:
            result.ended = f"cannot be read: {why(error)}"
        except Exception as error:  # a reader that fails on one file must not take the others along
            result.ended = reader_failed(error, config).encode(errors="replace").decode()
        yield result


def _read(result: Inspected, config: RunConfig, rows: int | None) -> None:
    fs, path = filesystem(result.path)
    if fs.get_file_info(path).type == pafs.FileType.Unknown:
        raise FormatError(result.path, PIPE)
    size = min(config.ingest.batch_rows, rows or config.ingest.batch_rows)
    with fs.open_input_file(path) as stream:
        result.compression = compression_of(stream.read(8))
        result.format, batches = read_capture(stream, result.path, config.captures, size)
        for batch in map(Outside(config.captures), batches):
            result.found.add(batch)
            if rows is not None and result.found.rows >= rows:
                result.stopped = True
                return


def together(results: list[Inspected]) -> Inspected:
    """All of them as if they were one."""
    total = Inspected(f"all {len(results)} captures", sum(result.bytes for result in results))
    total.format = ", ".join(sorted({result.format for result in results}))
    total.stopped = any(result.stopped for result in results)
    for result in results:
        total.found.merge(result.found)
    return total


# ---------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------


def show(results: list[Inspected]) -> None:
    """Print one capture in full; of several a line each, then all of them together."""
    console = terminal.console()
    if len(results) > 1:
        paths = [result.path for result in results]
        folder = os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071  of URIs, too
        console.print(one_line(f"in {folder}"))
        console.print(_lines(results, f"{folder}/"))
        for result in (result for result in results if result.ended is not None):
            console.print(one_line(f"{result.path.removeprefix(f'{folder}/')}: {_ended(result)}"))
        console.print()
    for one in results if len(results) == 1 else [together(results)]:
        console.print(one_line(one.path), style="bold")
        console.print(_section(one))


def _lines(results: list[Inspected], folder: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("capture", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name in ("size", "flows", "rejected", "left out", "sources"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("first", "last"):
        table.add_column(name, no_wrap=True)
    for result in results:
        found = result.found.facts(TOP)
        table.add_row(
            one_line(result.path.removeprefix(folder)),
            _format(result),
            words.size(result.bytes),
            words.number(found["flows"]) + (" or more" if result.stopped else ""),
            words.number(found["rejected"]),
            words.number(found["left_out"]),
            _about(found["sources"]),
            *(_time(found[name]) for name in ("first", "last")),
        )
    return table


def _section(result: Inspected) -> Table:
    found = result.found.facts(TOP)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, text in {
        "format": f"{_format(result)}, {words.size(result.bytes)}",
        "": _ended(result),
        "time": _span(found),
        "flows": words.number(found["flows"]),
        "rejected": _rejects(found, ("rows", "values")),
        "left out": _rejects(found, ("left out",)),
        "duplicates": words.count(found["duplicates"], "exact repeat") if found["duplicates"] else "",
        "sources": _about(found["sources"]),
        "destinations": _about(found["destinations"]),
        "protocols": _shares({words.protocol(p["proto"]): p["share"] for p in found["protocols"]}),
        "top ports": _shares({words.port(p["proto"], p["port"]): p["share"] for p in found["ports"]}),
        "recorded": _recorded(found),
        "missing": "\n".join(f"{name}{use and ': ' + use}" for name, use in found["missing"].items()),
        "tools": _shares({words.TOOLS[name]: share for name, share in found["fingerprints"].items()}),
        "sensors": _counts(found["sensors"]),
        "labels": _counts(found["labels"]),
    }.items():
        if text:
            table.add_row(name, lines(text))
    return table


def _format(result: Inspected) -> str:
    return result.format + (f" in {result.compression}" if result.compression else "")


def _ended(result: Inspected) -> str:
    if result.ended is None:
        return "stopped early: the rest was not looked at" if result.stopped else ""
    where = "" if result.offset is None else f" (at {result.offset:,})"
    return f"{'not read' if not result.found.flows else 'not read to the end'}: {result.ended}{where}"


def _time(iso: str | None) -> str:
    return words.NONE if iso is None else iso[:19].replace("T", " ")


def _span(found: dict[str, Any]) -> str:
    if found["first"] is None:
        return ""
    back = found["backwards"]
    order = f"; {words.count(back, 'flow')} earlier than the one before" if back else "; in time order"
    return f"{_time(found['first'])} to {_time(found['last'])} UTC{order}"


def _rejects(found: dict[str, Any], kinds: tuple[str, ...]) -> str:
    items = [item for item in found["rejects"] if item["lost"] in kinds]
    if not items:
        return ""
    rows = found["flows"] + found["rejected"] + found["left_out"]
    lost = sum(item["count"] for item in items if item["lost"] != "values")
    lines = [f"{words.number(lost)} of {words.count(rows, 'row')}"]
    for item in items:
        where = "" if item["offset"] is None else f", first at {item['offset']:,}"
        lines.append(f"{item['reason']}: {words.number(item['count'])}{where}")
    return "\n".join(lines)


def _about(distinct: dict[str, Any]) -> str:
    return (
        words.number(distinct["count"]) if distinct["exact"] else f"about {words.number(distinct['count'])}"
    )


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {words.percent(share)}" for name, share in shares.items())


def _recorded(found: dict[str, Any]) -> str:
    return ", ".join(
        name if share == 1 else f"{name} {words.percent(share)}"
        for name, share in found["columns"].items()
        if share
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{one_line(name)} {words.number(count)}" for name, count in counts.items())

"""Lists of known scanners, in the forms they are published in -> rows of schema.SCANNERS.

| form              | told by                            | organisation            | date                    |
|-------------------|------------------------------------|-------------------------|-------------------------|
| Parquet           | magic; columns net, len            | column org              | column as_of, by row    |
| NICTER JSON       | a list of objects                  | `scanner`               | `last_seen`, by row     |
| MISP warninglist  | an object with `list`              | `name`                  | `version`, if a date    |
| ipset             | a line `create` or `add`           | name of the set         | none                    |
| nftables          | a block `elements =` or `define`   | name of the set         | none                    |
| plain             | anything else: a network each line | none                    | none                    |

What a form does not say must be given: nothing is ever dated with the day of the import. A date in a file
says when its entries were true, so it is both ends of their validity unless the user gives others. Names of
organisations differ from list to list (Censys, censys.io), so they are folded to one spelling. What is no
network is counted; IPv6 networks too, since flows are IPv4.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayscan.captures.networks import networks_of_range, parse
from rayscan.errors import ConfigError, FormatError
from rayscan.schema import SCANNERS

_DOMAIN = re.compile(r"^(?:www\.)?([a-z0-9-]+)\.(?:com|net|org|io|ai|info|edu|de|nl|cn|how|co)$")
_BOTNETS = ("botnet", "mirai")
_COMMENT = re.compile(r"(?:#|;|//).*")
_RANGE = re.compile(r"\s+-\s+(?=\d+\.)")
_SHOWN = 5


@dataclass(frozen=True)
class Given:
    """What the user says of a list; what is None is taken from the file."""

    source: str
    organisation: str | None = None
    valid_from: date | None = None
    valid_to: date | None = None


@dataclass(frozen=True)
class Listed:
    """What one file held."""

    form: str
    entries: pa.Table  # schema.SCANNERS, without repetitions
    ipv6: int  # networks left out
    excluded: int  # exceptions to the other entries (`nomatch`), left out
    bad: int  # entries that are no network, or have no date where one is needed
    examples: list[str]  # the first of these
    dates: str  # where the dates come from, for people


class _Raw(NamedTuple):
    """Entries as the file has them: text, and None where the form does not say."""

    form: str
    networks: list[str]
    organisations: list[str] | None
    dates: list[str] | None
    dated_by: str = ""
    sources: list[str] | None = None
    excluded: int = 0


def read_list(data: bytes, path: str, given: Given) -> Listed:
    """The entries of a list, whose form its content tells.

    Raises FormatError where it holds no network at all, ConfigError where it lacks an organisation or a
    date and none is given.
    """
    raw = _raw(data, path)
    parsed = parse(pa.array(raw.networks, pa.string()))
    if parsed.bad.all():
        hint = f"; it begins with {raw.networks[0]!r}" if raw.networks else ""
        raise FormatError(path, f"no network found in this list (read as {raw.form}){hint}")
    first, last, dated_by = _validity(raw, path, given)
    absent = pc.or_(pc.is_null(first), pc.is_null(last)).to_numpy(zero_copy_only=False)
    undated = absent & ~parsed.bad & ~parsed.ipv6
    bad = [
        f"{raw.networks[i]} (row {i + 1}: no date)" if undated[i] else raw.networks[i]
        for i in np.flatnonzero(parsed.bad | undated)
    ]
    good = ~parsed.bad & ~parsed.ipv6 & ~undated
    keep = pa.array(np.flatnonzero(good))
    organisation = pc.take(_organisations(raw, path, given), keep)
    columns = {
        "network": parsed.network[good],
        "length": parsed.length[good],
        "organisation": organisation,
        "kind": pa.array([_kind(name) for name in organisation.to_pylist()], pa.string()),
        "source": pc.take(_column(raw.sources, given.source, len(good)), keep),
        "valid_from": pc.take(first, keep),
        "valid_to": pc.take(last, keep),
    }
    entries = pa.table([pa.array(columns[f.name]).cast(f.type) for f in SCANNERS], schema=SCANNERS)
    entries = entries.group_by(SCANNERS.names, use_threads=False).aggregate([]).select(SCANNERS.names)
    counts = int(parsed.ipv6.sum()), raw.excluded, len(bad), bad[:_SHOWN]
    return Listed(raw.form, entries.sort_by([(n, "ascending") for n in SCANNERS.names]), *counts, dated_by)


def fold(name: str) -> str:
    """One spelling of an organisation: "Max Planck Institute", "Censys (US)" and "censys.io" become
    maxplanckinstitute, censys and censys."""
    folded = re.sub(r"\s+", "", re.sub(r"(?<=\S)\s+\(.*?\)", "", name.strip().casefold()))
    domain = _DOMAIN.match(folded)
    return domain.group(1) if domain else folded


def _kind(organisation: str) -> str:
    return "botnet" if organisation.startswith(_BOTNETS) else "scanner"


def _column(values: list[str] | None, otherwise: str | None, n: int) -> pa.Array:
    return pa.array(values if values is not None else [otherwise] * n, pa.string())


def _organisations(raw: _Raw, path: str, given: Given) -> pa.Array:
    if given.organisation is not None:
        return _column(None, fold(given.organisation), len(raw.networks))
    if raw.organisations is None:
        raise ConfigError(f"{path} ({raw.form}) names no organisation: give --organisation NAME")
    spelling = {name: fold(name) for name in set(raw.organisations)}
    return pa.array([spelling[name] for name in raw.organisations], pa.string())


def _validity(raw: _Raw, path: str, given: Given) -> tuple[pa.Array, pa.Array, str]:
    """First and last day of each entry, and where they come from."""
    low, high = given.valid_from, given.valid_to
    own = _dates(raw.dates, path) if raw.dates is not None and (low is None or high is None) else None
    if own is None and low is None and high is None:
        raise ConfigError(
            f"{path} ({raw.form}) has no date: give --from DATE, the day for which the list is true "
            "(and --to DATE, the last such day)"
        )
    n = len(raw.networks)
    first = own if low is None and own is not None else pa.array([low or high] * n, pa.date32())
    last = own if high is None and own is not None else pa.array([high or low] * n, pa.date32())
    backward = np.flatnonzero(pc.fill_null(pc.less(last, first), False).to_numpy(zero_copy_only=False))
    if len(backward):
        row = int(backward[0])
        raise ConfigError(
            f"{path}: {len(backward):,} entries would end before they begin, the first of them "
            f"{raw.networks[row]} ({first[row]} to {last[row]}); check --from and --to"
        )
    said = [name for name, day in (("--from", low), ("--to", high)) if day is not None]
    dated_by = [raw.dated_by] if own is not None and len(said) < 2 else []
    return first, last, " and ".join(dated_by + said)


def _dates(texts: list[str], path: str) -> pa.Array:
    """Null where there is none, or none that can be read; FormatError if that is so everywhere."""
    days = {text: _day(text[:10]) for text in set(texts)}
    if not any(days.values()):
        raise FormatError(
            path, f"no date of this list can be read; the first is {texts[0]!r}: give --from DATE"
        )
    return pa.array([days[text] for text in texts], pa.date32())


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------


def _raw(data: bytes, path: str) -> _Raw:
    if data.startswith(b"PAR1"):
        return _parquet(data, path)
    text = data.decode("utf-8-sig", errors="replace")
    if text.lstrip().startswith(("[", "{")):
        return _json(text, path)
    if "{" not in text and re.search(r"^[ \t]*(?:create|add)[ \t]+\S+[ \t]+\S+", text, re.M):
        return _ipset(text)
    if re.search(r"\belements\s*=\s*\{|^[ \t]*(?:define[ \t]+\S+[ \t]*=|add[ \t]+element\b)", text, re.M):
        return _nftables(text)
    return _plain(text.splitlines())


def _parquet(data: bytes, path: str) -> _Raw:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise FormatError(path, f"damaged: Parquet: {error}") from None
    absent = [name for name in ("net", "len", "org", "source", "as_of") if name not in table.column_names]
    if absent:
        raise FormatError(
            path, f"columns {absent} are missing; a Parquet list has net, len, org, source, as_of"
        )
    number, length = table["net"].cast(pa.int64()), table["len"].cast(pa.string())
    octets = (pc.bit_wise_and(pc.shift_right(number, shift), 255) for shift in (24, 16, 8, 0))
    dotted = pc.binary_join_element_wise(*(octet.cast(pa.string()) for octet in octets), ".")
    is_address = pc.equal(pc.shift_right(number, 32), 0)
    networks = pc.if_else(is_address, dotted, number.cast(pa.string()))
    networks = pc.fill_null(pc.binary_join_element_wise(networks, length, "/"), "null")
    blank = {"org": "unknown", "source": "unknown", "as_of": ""}
    texts = {
        name: pc.fill_null(table[name].cast(pa.string()), fill).to_pylist() for name, fill in blank.items()
    }
    return _Raw(
        "Parquet", networks.to_pylist(), texts["org"], texts["as_of"], "its column as_of", texts["source"]
    )


def _json(text: str, path: str) -> _Raw:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"damaged: JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("list"), list):
        return _misp(found)
    if isinstance(found, list) and all(isinstance(row, dict) and "ip" in row for row in found):
        dates = [_text(row.get("last_seen") or "") for row in found]
        return _Raw(
            "NICTER JSON",
            [_text(row["ip"]) for row in found],
            [_text(row.get("scanner") or "unknown") for row in found],
            dates if any(dates) else None,
            "its last_seen",
        )
    raise FormatError(path, "JSON, but neither a MISP warninglist nor a list of objects with ip and scanner")


def _text(value: Any) -> str:
    """Without the halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    return str(value).encode(errors="replace").decode()


def _misp(found: dict[str, Any]) -> _Raw:
    networks = [_text(item) for item in found["list"]]
    version = re.fullmatch(r"(20\d\d)(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", str(found.get("version", "")))
    dates = ["-".join(version.groups())] * len(networks) if version else None
    name = found.get("name")
    names = [_text(name)] * len(networks) if name else None
    return _Raw("MISP warninglist", networks, names, dates, "its version")


def _ipset(text: str) -> _Raw:
    """`add NAME NETWORK ...`; ranges as FIRST-LAST. What is marked `nomatch` is an exception, no member."""
    lines = re.sub(r'"[^"\n]*"', " ", text).splitlines()
    rows = [[word for word in line.split() if not word.startswith("-")] for line in lines]
    added = [[*row, "", ""] for row in rows if row[:1] == ["add"]]
    members = [row for row in added if "nomatch" not in row[3:]]
    pairs = [(network, row[1]) for row in members for network in _spread(row[2])]
    networks, names = [network for network, _ in pairs], [name for _, name in pairs]
    return _Raw("ipset", networks, names, None, excluded=len(added) - len(members))


def _nftables(text: str) -> _Raw:
    """Elements of named sets, of `define NAME = { ... }` and of `add element FAMILY TABLE NAME { ... }`."""
    text = re.sub(r'"[^"\n]*"|#.*', " ", text)
    begins = re.compile(
        r"\bset\s+(?P<set>\S+)\s*\{|(?:\belements\s*=\s*|\bdefine\s+(?P<define>\S+)\s*=\s*"
        r"|\badd\s+element\s+(?:\S+\s+){1,2}(?P<add>\S+)\s*)\{(?P<inside>[^{}]*)"
    )
    name, networks, names = "unnamed", [], []
    for begin in begins.finditer(text):
        name = begin["set"] or begin["define"] or begin["add"] or name
        inside = begin["inside"] or ""
        items = [item.split()[0] for item in inside.split(",") if item.split()]
        spread = _flat(items)
        networks += spread
        names += [re.sub(r"_?(?:ip)?v[46]$", "", name)] * len(spread)
    return _Raw("nftables", networks, names, None)


def _plain(lines: Iterable[str]) -> _Raw:
    items = (_RANGE.sub("-", _COMMENT.sub("", line)).split() for line in lines)
    return _Raw("plain", _flat(words[0].rstrip(",") for words in items if words), None, None)


def _flat(items: Iterable[str]) -> list[str]:
    return [network for item in items for network in _spread(item)]


def _spread(item: str) -> list[str]:
    """FIRST-LAST as networks; anything else as it is."""
    first, dash, last = item.partition("-")
    if not dash:
        return [item]
    try:
        return networks_of_range(first, last)
    except (ValueError, TypeError):
        return [item]

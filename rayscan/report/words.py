"""How values read on the page: thousands separators, shares, dotted addresses, UTC, durations in words.

Every function takes None (or NaN), where a value may be missing, and gives a dash.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any

NONE = "–"
PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 47: "gre", 58: "icmpv6", 132: "sctp"}
TOOLS = {"zmap": "ZMap", "masscan": "masscan", "mirai": "Mirai"}
ZMAP_RANDOM = datetime(2024, 3, 1, tzinfo=UTC)
"""From then on ZMap draws its IP id at random (4.1.0, zmap/zmap#798)."""
MIRAI_SEEN = datetime(2016, 8, 1, tzinfo=UTC)
"""Mirai's first scans (Antonakakis et al., Understanding the Mirai Botnet, 2017)."""
_UNITS = (
    ("day", 86_400_000_000),
    ("hour", 3_600_000_000),
    ("minute", 60_000_000),
    ("second", 1_000_000),
    ("millisecond", 1_000),
    ("microsecond", 1),
)


def caution(tool: str, first: datetime | None, last: datetime | None) -> str:
    """What the mark of a tool can mean in the years of the traffic."""
    if tool == "masscan":
        return "masscan's holds by chance for one packet in 65,536: a few such flows mean nothing."
    if tool == "zmap" and last is not None and last >= ZMAP_RANDOM:
        return (
            "ZMap's is a fixed IP id that builds since March 2024 no longer send: its absence says nothing."
        )
    if tool == "mirai" and first is not None and first < MIRAI_SEEN:
        return "Mirai's means nothing before August 2016, when Mirai appeared."
    return ""


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def number(value: int | float | None) -> str:
    """Whole number with separators: 1,234,567."""
    return NONE if value is None or missing(value) else f"{value:,.0f}"


def count(value: int, noun: str, plural: str = "") -> str:
    """'1 source', '2,000 sources'."""
    return f"{number(value)} {noun if value == 1 else plural or noun + 's'}"


def percent(share: float | None) -> str:
    """Share of one as a percentage; what is neither nothing nor everything is never shown as such."""
    if share is None or missing(share):
        return NONE
    if 0 < share < 0.0001:
        return "under 0.01%"
    if 0.999 < share < 1:
        return "over 99.9%"
    digits = 2 if 0 < share < 0.001 else 1 if share < 0.1 or share > 0.99 else 0
    return f"{100 * share:.{digits}f}%" if 0 < share < 1 else f"{100 * share:.0f}%"


def ratio(part: float, whole: float) -> str:
    return percent(part / whole) if whole else NONE


def figure(value: float | None) -> str:
    """A score with three decimals."""
    return NONE if value is None or missing(value) else f"{value:.3f}".replace("-", "−")


def interval(item: dict[str, Any] | None) -> str:
    """'0.975 to 0.988' of a figure with bounds, or nothing."""
    if not item or missing(item.get("low")) or missing(item.get("high")):
        return ""
    return f"{figure(item['low'])} to {figure(item['high'])}"


def instant(value: datetime | None) -> str:
    """Time in UTC to the second."""
    return NONE if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def day(value: datetime | None) -> str:
    return NONE if value is None else f"{value.astimezone(UTC):%Y-%m-%d}"


def duration(us: int | None) -> str:
    """Microseconds in words: '640 microseconds', '1.5 hours', '12 days'."""
    if us is None:
        return NONE
    if us <= 0:
        return "0 seconds"
    unit, size = next((item for item in _UNITS if us >= 0.9995 * item[1]), _UNITS[-1])
    text = f"{us / size:,.0f}" if us >= 9.95 * size else f"{us / size:.1f}".removesuffix(".0")
    return f"{text} {unit}{'' if text == '1' else 's'}"


def size(value: int | None) -> str:
    """Bytes in decimal units: 12.3 MB."""
    if value is None:
        return NONE
    amount = float(value)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def bars(values: list[int]) -> str:
    """'▁·▄█': a sign for each number, in eighths of the largest; a dot for none."""
    most = max(values, default=0)
    return "".join("▁▂▃▄▅▆▇█"[-(-8 * value // most) - 1] if value else "·" for value in values)


def address(value: int) -> str:
    """IPv4 address, from 0 to 2^32 - 1, as dotted text."""
    return ".".join(str(value >> shift & 255) for shift in (24, 16, 8, 0))


def protocol(number: int) -> str:
    """'tcp', 'protocol 99'."""
    return PROTOCOLS.get(number, f"protocol {number}")


def port(proto: int | None, number: int | None) -> str:
    """'23/tcp'; for ICMP, whose port column holds the type, 'icmp type 8'."""
    name = "unknown protocol" if proto is None or proto < 0 else protocol(proto)
    if number is None or number < 0:
        return f"{name}, no port"
    return f"{name} type {number}" if name.startswith("icmp") else f"{number}/{name}"


def span(first: datetime | None, last: datetime | None) -> str:
    """Time from first to last, in words."""
    if first is None or last is None:
        return NONE
    return duration(round((last - first).total_seconds() * 1e6))


def listed(items: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def network(value: int, length: int) -> str:
    """'198.51.0.0/16'."""
    return f"{address(value)}/{length}"


def sequence(row: dict[str, Any]) -> str:
    """What a sequence (a row of schema.SEQUENCES) did, without its source: when, ports, targets, pace."""
    flows = row["length"]
    within = f" within {span(row['start'], row['end'])}" if flows > 1 else ""
    text = f"{count(flows, 'flow')}{within} from {instant(row['start'])}, to {_asked(row)}"
    targets = {dst for dst in row["dst"] or () if dst >= 0}
    if targets:
        text += f", {count(len(targets), 'destination')}"
    gaps = sorted((row["gap_us"] or ())[1:])
    if gaps:
        text += f", usually {duration(gaps[(len(gaps) - 1) // 2])} apart"
    marks = [f"{TOOLS[name]} on {percent(row[name])}" for name in TOOLS if row[name]]
    return f"{text}; mark of {listed(marks)} of them" if marks else text


def _asked(row: dict[str, Any]) -> str:
    """'23/tcp (15) and 2323/tcp (1)'; of more than four ports the three commonest."""
    counts = Counter(zip(row["proto"] or (), row["dst_port"] or (), strict=True)).most_common()
    counts.sort(key=lambda item: (-item[1], item[0]))
    if len(counts) == 1:
        return port(*counts[0][0])
    named = [f"{port(*key)} ({n})" for key, n in counts[: 3 if len(counts) > 4 else 4]]
    return f"{number(len(counts))} ports: {', '.join(named)}, …" if len(counts) > 4 else listed(named)


def change(row: dict[str, Any]) -> str:
    """What became of a campaign since the period before, from a row of `history.with_change`."""
    event: str = row["event"]
    if event != "continued":
        return {"born": "new", "split": "split off"}.get(event, event)
    before, now = row["sources_before"], row["sources"]
    if not before:
        return event
    back = "back, " if row["paused"] else ""
    if row["became"] != event:
        back += f"{row['became']} "
    if now == before:
        return f"{back}as many"
    times = now / before
    return back + (f"× {times:.1f}" if times >= 2 else f"{100 * (times - 1):+.0f}%").replace("-", "−")

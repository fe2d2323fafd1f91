"""Networks, lists of known scanners and their dates, against Python's own `ipaddress` and plain loops."""

from __future__ import annotations

import io
import ipaddress
import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.captures.networks import Networks, as_text, networks_of_range, parse
from rayscan.captures.scanner_lists import Given, fold, read_list
from rayscan.captures.scanners import NOT_KNOWN, Scanners
from rayscan.errors import ConfigError, FormatError
from rayscan.schema import SCANNERS, SEQUENCES

EPOCH, DAY = date(1970, 1, 1), date(2024, 3, 1)
GIVEN = Given("test", "somebody", DAY)
SAID = {"organisation": "x", "valid_from": DAY}
# Few addresses, so that networks nest, touch and repeat; both ends of the space are among them.
ADDRESSES = st.one_of(
    st.integers(0, 40), st.integers(2**32 - 40, 2**32 - 1), st.integers(2**31 - 5000, 2**31 + 5000)
)
NETWORKS = st.lists(st.tuples(ADDRESSES, st.integers(0, 32)), max_size=12)


def number(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


@given(networks=NETWORKS, asked=st.lists(ADDRESSES, min_size=1, max_size=20))
def test_networks_hold_what_ipaddress_says(networks: list[tuple[int, int]], asked: list[int]) -> None:
    built = Networks(*(np.array([pair[i] for pair in networks], np.int64) for i in range(2)))
    nets = [ipaddress.IPv4Network(pair, strict=False) for pair in networks]
    first, count = built.covering(np.array(asked))
    longest = built.longest(np.array(asked))
    for i, value in enumerate(asked):
        holding = [n for n, net in enumerate(nets) if ipaddress.IPv4Address(value) in net]
        expected = sorted(holding, key=lambda n: (-networks[n][1], n))
        assert built.members[first[i] : first[i] + count[i]].tolist() == expected
        assert longest[i] == (expected[0] if expected else -1)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_a_number_that_is_no_address_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="no IPv4 address"):
        Networks(np.array([1]), np.array([32])).covering(np.array([5, number]))


def test_networks_as_text() -> None:
    texts = [
        "192.0.2.9",
        "192.0.2.9/24",
        "0.0.0.0/0",
        "2001:db8::/32",
        "::1",
        "192.0.2.1/33",
        "1.2.3",
        "7",
        "",
        "x/8",
    ]
    found = parse(pa.array(texts))
    again = [as_text(int(found.network[i]), int(found.length[i])) for i in range(3)]
    assert again == ["192.0.2.9/32", "192.0.2.0/24", "0.0.0.0/0"]
    assert found.ipv6.tolist() == [False] * 3 + [True] * 2 + [False] * 5
    assert found.bad.tolist() == [False] * 5 + [True] * 5
    assert networks_of_range("10.0.0.0", "10.0.0.5") == ["10.0.0.0/30", "10.0.0.4/31"]


# ---------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------

NFT = """#!/usr/sbin/nft -f
table inet filter {
  set shodan_v4 { # "quoted" {brace}
    type ipv4_addr
    flags interval
    elements = { 66.240.192.138, 71.6.135.131/32,
                 80.82.77.33 comment "a, b", 10.0.0.0-10.0.0.5, nonsense }
  }
}
define censys_v6 = { 2001:db8::/32 }
define censys_v4 = {
\t162.142.125.0/24, # trailing comma
}
add element inet filter onyphe { 9.9.9.9 }
"""


def entries(data: str | bytes, **given: Any) -> list[tuple[str, str, date, date]]:
    data = data.encode() if isinstance(data, str) else data
    rows = read_list(data, "f", Given("test", **given)).entries.to_pylist()
    return [
        (as_text(r["network"], r["length"]), r["organisation"], r["valid_from"], r["valid_to"]) for r in rows
    ]


def test_ipset() -> None:
    text = "create censys.io hash:net family inet\nadd censys.io 74.120.14.0/24\n"
    text += "add censys.io 198.108.66.7/23 timeout 0\n"
    assert entries(text, valid_from=DAY) == [
        ("74.120.14.0/24", "censys", DAY, DAY), ("198.108.66.0/23", "censys", DAY, DAY)
    ]  # fmt: skip


def test_ipset_options_and_exceptions() -> None:
    text = "create a hash:net -exist\nadd -exist a 192.0.2.0/24\nadd a 192.0.2.8/29 nomatch\n"
    text += 'add a 10.0.0.0/8 timeout 0 comment "no nomatch"\nadd\n'
    listed = read_list(text.encode(), "f", Given("test", valid_from=DAY))
    found = [(as_text(r["network"], r["length"]), r["organisation"]) for r in listed.entries.to_pylist()]
    assert found == [("10.0.0.0/8", "a"), ("192.0.2.0/24", "a")]
    assert (listed.excluded, listed.bad) == (1, 1)


@pytest.mark.timeout(20)
def test_blank_lines_and_open_braces_take_no_time() -> None:
    """Some kilobytes; a quadratic search would take minutes."""
    blank = "\n" * 1_000_000
    assert entries(f"{blank}192.0.2.1\n", **SAID) == [("192.0.2.1/32", "x", DAY, DAY)]
    assert len(entries("elements={192.0.2.1 " * 50_000, **SAID)) == 1


def test_plain_lines_with_comments() -> None:
    text = "\ufeff# ours\r\n192.0.2.1 # one\r\n\r\n192.0.2.1\n198.51.100.0/24, ; more\n// no\n"
    text += "10.0.0.0-10.0.0.1\n10.0.0.2 - 10.0.0.3 - ours\n192.0.2.9 - ours\nfoo\n2001:db8::1\n"
    listed = read_list(text.encode(), "f", GIVEN)
    assert (listed.form, listed.ipv6, listed.bad, listed.examples) == ("plain", 1, 1, ["foo"])
    assert [as_text(r["network"], r["length"]) for r in listed.entries.to_pylist()] == [
        "10.0.0.0/31", "10.0.0.2/31", "192.0.2.1/32", "192.0.2.9/32", "198.51.100.0/24"
    ]  # fmt: skip


def test_nftables() -> None:
    listed = read_list(NFT.encode(), "f", Given("test", valid_from=DAY))
    assert (listed.form, listed.ipv6, listed.bad, listed.examples) == ("nftables", 1, 1, ["nonsense"])
    found = {(as_text(r["network"], r["length"]), r["organisation"]) for r in listed.entries.to_pylist()}
    assert found == {
        ("66.240.192.138/32", "shodan"), ("71.6.135.131/32", "shodan"), ("80.82.77.33/32", "shodan"),
        ("10.0.0.0/30", "shodan"), ("10.0.0.4/31", "shodan"), ("162.142.125.0/24", "censys"),
        ("9.9.9.9/32", "onyphe"),
    }  # fmt: skip
    quoted = 'elements = { 192.0.2.1 comment "scanner #1", 192.0.2.2,\n 192.0.2.3 } # "'
    assert len(entries(quoted, valid_from=DAY)) == 3
    cut = entries("define a = { 192.0.2.10, 192.0.2.19", valid_from=DAY)
    assert [row[0] for row in cut] == ["192.0.2.10/32", "192.0.2.19/32"]


def test_misp_warninglist() -> None:
    found = {"name": "Shodan", "list": ["192.0.2.0/24", "2001:db8::/32"], "matching_attributes": ["ip-src"]}
    assert entries(json.dumps({**found, "version": 20240229})) == [
        ("192.0.2.0/24", "shodan", date(2024, 2, 29), date(2024, 2, 29))
    ]
    with pytest.raises(ConfigError, match="has no date: give --from"):
        entries(json.dumps({**found, "version": 26081010}))


def test_nicter_json_is_dated_by_row() -> None:
    rows = [
        {"ip": "192.0.2.1", "scanner": "Max Planck Institute", "last_seen": "2024-10-09"},
        {"ip": "192.0.2.2", "scanner": "Censys", "last_seen": "2024-12-31"},
    ]
    assert entries(json.dumps(rows)) == [
        ("192.0.2.1/32", "maxplanckinstitute", date(2024, 10, 9), date(2024, 10, 9)),
        ("192.0.2.2/32", "censys", date(2024, 12, 31), date(2024, 12, 31)),
    ]
    since = entries(json.dumps(rows), valid_from=date(2024, 1, 1))
    assert [row[2:] for row in since] == [
        (date(2024, 1, 1), date(2024, 10, 9)), (date(2024, 1, 1), date(2024, 12, 31))
    ]  # fmt: skip


def test_undated_rows_cost_themselves() -> None:
    rows = [
        {"ip": "192.0.2.1", "scanner": "x", "last_seen": "2024-10-09"},
        {"ip": "192.0.2.2", "scanner": "x"},
        {"ip": "192.0.2.3", "scanner": None, "last_seen": "soon"},
    ]
    listed = read_list(json.dumps(rows).encode(), "f", Given("test"))
    assert listed.entries["valid_from"].to_pylist() == [date(2024, 10, 9)]
    assert listed.examples == ["192.0.2.2 (row 2: no date)", "192.0.2.3 (row 3: no date)"]
    assert listed.bad == 2
    both = entries(json.dumps(rows), valid_from=DAY, valid_to=DAY)
    assert [row[1:] for row in both] == [("x", DAY, DAY), ("x", DAY, DAY), ("unknown", DAY, DAY)]


def test_merged_parquet() -> None:
    table = pa.table(
        {
            "net": pa.array([number("192.0.2.0"), number("192.0.2.0"), None, 1, -1, 2**33], pa.int64()),
            "len": pa.array([24, 24, 24, None, 24, 24], pa.uint8()),
            "org": ["censys", "botnet_rdp", "x", "x", "x", "x"],
            "source": ["nicter_2023", "greynoise", "x", "x", "x", "x"],
            "as_of": ["2023-01-27", "2025-10-10", *["2023-01-27"] * 4],
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    listed = read_list(sink.getvalue(), "f", Given("not used"))
    assert (listed.bad, listed.examples) == (4, ["null", "null", "-1/24", "8589934592/24"])
    rows = listed.entries.to_pylist()
    assert [(r["organisation"], r["source"], r["kind"], str(r["valid_from"])) for r in rows] == [
        ("botnet_rdp", "greynoise", "botnet", "2025-10-10"),
        ("censys", "nicter_2023", "scanner", "2023-01-27"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("192.0.2.1\n", {"organisation": "x"}, "has no date: give --from"),
        ("192.0.2.1\n", {"valid_from": DAY}, "names no organisation: give --organisation"),
        ("192.0.2.1\n", {**SAID, "valid_to": DAY - timedelta(1)}, "1 entries would end .* 192.0.2.1 "),
        ('[{"ip": "192.0.2.1", "scanner": "x", "last_seen": "2024-13-01"}]', {}, "no date of this"),
        ('{"ip": 1}', {}, "neither a MISP"),
        ("{", {}, "damaged: JSON"),
        ("[" * 100_000, {}, "damaged: JSON"),
        ('[{"ip": "\\ud800", "scanner": "\\ud800", "last_seen": "\\ud800"}]', {}, "no network found"),
        ("hello world\n", SAID, "no network found in this list .read as plain"),
        ("", SAID, "no network found"),
        ("PAR1", {}, "damaged: Parquet"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_taken(text: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, FormatError), match=message):
        entries(text, **given)


def test_one_spelling_of_an_organisation() -> None:
    names = ["Censys", "censys.io", " CENSYS (US) ", "www.censys.com"]
    assert {fold(name) for name in names} == {"censys"}
    assert fold("Max Planck  Institute") == "maxplanckinstitute"
    assert fold("(ours)") == "(ours)"


@settings(max_examples=60)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        listed = read_list(data, "f", GIVEN)
    except (FormatError, ConfigError):
        return
    assert listed.entries.schema == SCANNERS


# ---------------------------------------------------------------------------------------------
# Dates
# ---------------------------------------------------------------------------------------------


def scanner_table(rows: list[tuple[int, int, str, int, int]]) -> pa.Table:
    """Rows of network, length, organisation, and first and last day since 1970."""
    columns = [
        {"network": n >> (32 - length) << (32 - length), "length": length, "organisation": who,
         "kind": "scanner", "source": "s", "valid_from": EPOCH + timedelta(low),
         "valid_to": EPOCH + timedelta(high)}
        for n, length, who, low, high in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(columns, SCANNERS)


ENTRY = st.tuples(
    ADDRESSES, st.integers(8, 32), st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 9)
)


@given(
    rows=st.lists(ENTRY, max_size=10),
    asked=st.lists(st.tuples(ADDRESSES, st.integers(0, 40)), min_size=1, max_size=20),
    tolerance=st.integers(0, 12),
)
def test_the_entry_that_counts(
    rows: list[tuple[int, int, str, int, int]], asked: list[tuple[int, int]], tolerance: int
) -> None:
    table = scanner_table([(n, length, who, low, low + span) for n, length, who, low, span in rows])
    known = Scanners(table, tolerance)
    found = known.find(*(np.array([pair[i] for pair in asked]) for i in range(2)))
    for (address, day), entry, off in zip(asked, found.entry, found.days_off, strict=True):
        best = None
        for row in known.entries.to_pylist():
            if address >> (32 - row["length"]) != row["network"] >> (32 - row["length"]):
                continue
            low, high = ((row[name] - EPOCH).days for name in ("valid_from", "valid_to"))
            days = max(low - day, day - high, 0)
            key = (days > 0, -row["length"], days, row["organisation"])
            if days <= tolerance and (best is None or key < best):
                best = key
        if best is None:
            assert (entry, off) == (NOT_KNOWN, 0)
            continue
        row = known.entries.slice(int(entry), 1).to_pylist()[0]
        assert (-row["length"], off, row["organisation"]) == best[1:]


def test_the_list_of_the_time_wins() -> None:
    """An address that changed hands is who it was at the time; nobody, where no list is near enough."""
    net, day = number("198.51.100.0"), 19_000
    old, new = (net, 32, "old", day, day), (net, 32, "new", day + 400, day + 430)
    known = Scanners(scanner_table([old, new, (net, 24, "wide", day, day + 5)]), 100)
    days = np.array([day, day + 3, day + 50, day + 250, day + 350, day + 400, day + 600])
    found = known.find(np.full(len(days), net), days)
    names = known.entries["organisation"].to_pylist()
    who = [names[i] if i != NOT_KNOWN else None for i in found.entry]
    assert who == ["old", "wide", "old", None, "new", "new", None]
    assert found.days_off.tolist() == [0, 0, 50, 0, 50, 0, 0]
    assert [r["organisation"] for r in known.covering(net).to_pylist()] == ["new", "old", "wide"]


def test_sequences_are_asked_on_their_first_day() -> None:
    day = 19_000
    known = Scanners(scanner_table([(7, 32, "x", day, day)]), 1)
    micros = [day * 86_400_000_000 + 86_399_999_999, (day + 2) * 86_400_000_000]
    sequences = pa.table({"src": [7, 7], "start": pa.array(micros, SEQUENCES.field("start").type)})
    assert known.known(sequences).organisation.to_pylist() == ["x", None]


@pytest.mark.data
def test_real_lists(real_data: Path) -> None:
    """Every published form, with the numbers of networks that are in the files by grep."""
    counts = {}
    for path in sorted((real_data / "scanners" / "raw").iterdir()):
        given = Given("test") if path.name.startswith("nicter") else GIVEN
        listed = read_list(path.read_bytes(), path.name, given)
        counts[path.name] = (listed.form, listed.entries.num_rows, listed.ipv6, listed.bad)
    assert counts == {
        "dataplane_v4.txt": ("plain", 2, 0, 0),
        "nethash.censys.io.ipset": ("ipset", 9, 0, 0),
        "nethash.onyphe.io.ipset": ("ipset", 37, 0, 0),
        "nethash.shodan.io.ipset": ("ipset", 42, 0, 0),
        "nicter_surveyscanner_2024.json": ("NICTER JSON", 15_000, 0, 0),
        "onlyscans_v4.txt": ("plain", 4, 0, 0),
        "onyphe-nt-scanning.json": ("MISP warninglist", 151, 0, 0),
        "rapid7-nt-scanning.json": ("MISP warninglist", 18, 0, 0),
        "shadowserver.json": ("MISP warninglist", 26, 1, 0),
    }

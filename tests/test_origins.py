"""AS numbers and countries: the longest prefix, a real database, and files that are neither."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayscan.captures.origins import COUNTRIES, SYSTEMS, AsNumbers, MaxMind
from rayscan.errors import FormatError
from rayscan.report.summary import origins


def numbers(*texts: str) -> Any:
    return np.array([int(ipaddress.IPv4Address(text)) for text in texts], np.int64)


def test_pfx2as() -> None:
    text = b"1.0.0.0\t24\t13335\n1.0.0.0\t16\t64500_64501\n1.0.4.0\t22\t64502,64503\n2001:db8::\t32\t1\n"
    found = AsNumbers(text, "f")(numbers("1.0.0.1", "1.0.1.1", "1.0.7.255", "2.0.0.1", "0.255.255.255"))
    assert found.to_pylist() == ["AS13335", "AS64500_64501", "AS64502,64503", None, None]


@pytest.mark.parametrize("line", ["1.0.0.0\t24", "1.0.0\t24\t1", "1.0.0.0\t33\t1", "<html>", ""])
def test_lines_that_are_no_prefix(line: str) -> None:
    with pytest.raises(FormatError, match="f at 1: no"):
        AsNumbers(f"1.0.0.0\t24\t1\n{line}\n2.0.0.0\t24\t2\n".encode(), "f")


def test_most_common_names_of_a_cluster() -> None:
    clusters = pa.table({"sequence_id": range(5), "src": [1, 1, 2, 3, 9], "cluster": [4, 4, 4, 4, 7]})
    names = {1: "AS1", 2: "AS2", 3: "AS2"}
    found = origins(clusters, "p", lambda src: pa.array([names.get(int(s)) for s in src], pa.string()))
    assert found.to_pylist() == [
        {
            "period": "p",
            "cluster": 4,
            "names": [{"label": "AS2", "sources": 2}, {"label": "AS1", "sources": 1}],
        },
        {"period": "p", "cluster": 7, "names": []},
    ]


# ---------------------------------------------------------------------------------------------
# MaxMind databases, written here to the published format 2.0
# ---------------------------------------------------------------------------------------------


def field(kind: int, size: int, content: bytes) -> bytes:
    """A value of the data section: its type and size, then its bytes."""
    assert size < 29 + 256
    head = [min(size, 29)] if kind > 7 else [kind << 5 | min(size, 29)]
    head += [kind - 7] if kind > 7 else []
    return bytes(head + ([size - 29] if size >= 29 else [])) + content


def encoded(value: Any) -> bytes:
    """A map, list, string or number; numbers as (bytes, value), since each has a type of its own."""
    if isinstance(value, dict):
        return field(7, len(value), b"".join(encoded(k) + encoded(v) for k, v in value.items()))
    if isinstance(value, list):
        return field(11, len(value), b"".join(encoded(v) for v in value))
    if isinstance(value, str):
        return field(2, len(value.encode()), value.encode())
    size, number = value
    return field({2: 5, 4: 6, 8: 9}[size], size, number.to_bytes(size, "big"))


def database(kind: str, networks: dict[str, Any]) -> bytes:
    """A binary search tree of 32-bit records over the networks, which must not nest, and their data."""
    data, places = b"", {}
    for text, record in networks.items():
        places[text], data = len(data), data + encoded(record)
    nodes: list[list[int | str | None]] = [[None, None]]
    for text in networks:
        net, at = ipaddress.IPv4Network(text), 0
        for bit in range(net.prefixlen):
            side = int(net.network_address) >> (31 - bit) & 1
            if bit == net.prefixlen - 1:
                nodes[at][side] = text
            elif nodes[at][side] is None:
                nodes[at][side] = len(nodes)
                nodes.append([None, None])
            at = int(nodes[at][side]) if isinstance(nodes[at][side], int) else at
    n = len(nodes)

    def record(value: int | str | None) -> int:
        return n if value is None else n + 16 + places[value] if isinstance(value, str) else value

    tree = b"".join(record(side).to_bytes(4, "big") for node in nodes for side in node)
    facts = {
        "binary_format_major_version": (2, 2), "binary_format_minor_version": (2, 0), "build_epoch": (8, 1),
        "languages": [], "database_type": kind, "description": {}, "ip_version": (2, 4),
        "node_count": (4, n), "record_size": (2, 32),
    }  # fmt: skip
    return tree + bytes(16) + data + b"\xab\xcd\xefMaxMind.com" + encoded(facts)


def test_countries_of_a_database(tmp_path: Path) -> None:
    pytest.importorskip("maxminddb", reason="the extra mmdb is not installed")
    path = tmp_path / "country.mmdb"
    records = {
        "1.0.0.0/8": {"country": {"iso_code": "DE"}},
        "2.0.0.0/7": {"registered_country": {"iso_code": "FR"}},
        "4.0.0.0/8": {"continent": "EU"},
    }
    path.write_bytes(database("GeoLite2-Country", records))
    found = MaxMind(str(path))
    assert found.title == COUNTRIES
    assert found(numbers("1.2.3.4", "3.0.0.1", "4.0.0.1", "5.0.0.1")).to_pylist() == ["DE", "FR", None, None]


def test_as_numbers_of_a_database(tmp_path: Path) -> None:
    pytest.importorskip("maxminddb", reason="the extra mmdb is not installed")
    path = tmp_path / "asn.mmdb"
    record = {"autonomous_system_number": (4, 64500), "autonomous_system_organization": "EXAMPLE"}
    path.write_bytes(database("GeoLite2-ASN", {"1.0.0.0/8": record}))
    found = MaxMind(str(path))
    assert found.title == SYSTEMS
    assert found(numbers("1.2.3.4", "5.0.0.1")).to_pylist() == ["AS64500 EXAMPLE", None]


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_files_that_are_no_database(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("maxminddb", reason="the extra mmdb is not installed")
    if content is not None:
        (tmp_path / "x.mmdb").write_bytes(content)
    with pytest.raises(FormatError, match="cannot be read as a MaxMind database"):
        MaxMind(str(tmp_path / "x.mmdb"))

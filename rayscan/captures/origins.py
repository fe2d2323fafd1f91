"""Where sources come from, by files that the user brings: AS numbers and countries of addresses.

`pfx2as` is CAIDA's text form: in each line a prefix, its length and its AS number, separated by tabs; several
origins of a prefix read 64500_64501, a set reads 64500,64501. A MaxMind database needs the package
`maxminddb`. Either says where an address is at the date of the file, not at that of the traffic.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan.captures.networks import Networks, parse
from rayscan.captures.values import Ints
from rayscan.errors import ConfigError, FormatError

SYSTEMS, COUNTRIES = "Autonomous systems", "Countries"
_LINE = re.compile(r"(\S+)\s+(\d+)\s+(\d[\d_,]*)")


class AsNumbers:
    """Names such as AS64500 of addresses, by a pfx2as file; the longest prefix wins."""

    def __init__(self, data: bytes, path: str) -> None:
        """Raises FormatError for a line that is none of that form; prefixes of IPv6 are passed over."""
        rows = []
        for number, line in enumerate(data.decode("ascii", "replace").splitlines()):
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise FormatError(path, f"no line of a pfx2as file: {line[:80]!r}", number)
            rows.append(match.groups())
        parsed = parse(pa.array([f"{prefix}/{length}" for prefix, length, _ in rows], pa.string()))
        if parsed.bad.any():
            number = int(parsed.bad.argmax())
            raise FormatError(path, f"no prefix: {'/'.join(rows[number][:2])}", number)
        kept = np.flatnonzero(~parsed.ipv6)
        self._names = pa.array([f"AS{rows[i][2]}" for i in kept], pa.string()).dictionary_encode()
        self._networks = Networks(parsed.network[kept], parsed.length[kept])

    def __call__(self, addresses: Ints) -> pa.Array:
        place = self._networks.longest(addresses)
        return pc.take(self._names, pa.array(place, mask=place < 0)).dictionary_decode()


class MaxMind:
    """Countries, or of a database of AS numbers names such as AS64500 EXAMPLE, of addresses."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError where the package is missing, FormatError for a file that is no database."""
        try:
            import maxminddb
        except ImportError:
            raise ConfigError(
                "report.mmdb needs the package maxminddb: pip install 'rayscan[mmdb]'"
            ) from None
        try:
            self._reader = maxminddb.open_database(path)
        except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
            raise FormatError(path, f"cannot be read as a MaxMind database: {error}") from None
        self.title = SYSTEMS if "ASN" in self._reader.metadata().database_type else COUNTRIES

    def __call__(self, addresses: Ints) -> pa.Array:
        octets = (addresses >> shift & 255 for shift in (24, 16, 8, 0))
        texts = pc.binary_join_element_wise(*(pa.array(o).cast(pa.string()) for o in octets), ".")
        return pa.array([_name(self._reader.get(text)) for text in texts.to_pylist()], pa.string())


def _name(record: Any) -> str | None:
    """What a record says, of the layouts of GeoLite2 and the like."""
    if not isinstance(record, dict):
        return None
    if "autonomous_system_number" in record:
        organisation = str(record.get("autonomous_system_organization", ""))
        return f"AS{record['autonomous_system_number']} {organisation}".strip()
    country = record.get("country") or record.get("registered_country") or {}
    code = country.get("iso_code") if isinstance(country, dict) else country
    return None if code is None else str(code)

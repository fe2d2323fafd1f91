"""Reading what an export is made of: the campaigns of some periods and the sources in them. Needs no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from rayscan.config import RunConfig
from rayscan.errors import DataError
from rayscan.progress import say
from rayscan.report import exports
from rayscan.report.exports import MEMBERS, Addresses
from rayscan.tables import Workspace

Format = Literal["csv", "parquet", "misp-warninglist", "stix", "graphml"]
_OF_ADDRESSES = ("misp-warninglist", "stix")


def run(
    workspace: Workspace,
    config: RunConfig,
    kind: Format,
    table: Literal["campaigns", "sources"],
    periods: Sequence[str],
    names: Sequence[str],
) -> tuple[bytes, int]:
    """The export as bytes, and how many campaigns it holds.

    `periods`: the newest when empty. `names`: campaigns by name or its beginning; all when empty. Raises
    DataError for what is not there, and where pseudonyms would pass for addresses.
    """
    raw = workspace.addresses == "raw"
    if kind in _OF_ADDRESSES and not raw:
        raise DataError(
            f"{workspace.uri} holds pseudonyms (ingest.addresses=cryptopan): a {kind} export would accuse "
            "addresses that have nothing to do with it; csv, parquet and graphml say that they are pseudonyms"
        )
    rows = _campaigns(workspace, config, periods, names, merged=kind == "graphml")
    campaigns = rows.filter(pc.is_valid(rows["cluster"]))
    addresses: Addresses = "source" if raw else "pseudonym"
    if kind in ("csv", "parquet"):
        if table == "campaigns":
            shown = exports.campaign_table(campaigns)
        else:
            shown = exports.source_table(_members(workspace, config, campaigns), addresses)
        return (exports.as_csv(shown) if kind == "csv" else exports.as_parquet(shown)), campaigns.num_rows
    found = _members(workspace, config, campaigns)
    if kind == "misp-warninglist":
        return exports.as_warninglist(campaigns, found, config.run), campaigns.num_rows
    if kind == "stix":
        committed = _committed(workspace, config, campaigns)
        return exports.as_stix(campaigns, found, config.run, committed), campaigns.num_rows
    _say_if_cut(campaigns)
    return exports.as_graphml(rows, found, addresses), campaigns.num_rows


def _campaigns(
    workspace: Workspace, config: RunConfig, periods: Sequence[str], names: Sequence[str], merged: bool
) -> pa.Table:
    """Campaigns of two sequences or more that have a cluster in these periods; or that `merged` in them."""
    there = sorted({file.key["period"] for file in workspace.table("campaigns").files({"run": config.run})})
    if not there:
        raise DataError(f"run {config.run} of {workspace.uri} has no campaigns; see `rayscan campaigns`")
    unknown = sorted(set(periods) - set(there))
    if unknown:
        raise DataError(f"run {config.run} has no period {unknown[0]}; there are {', '.join(there)}")
    parts = [
        workspace.table("campaigns").read({"run": config.run, "period": period})
        for period in sorted(set(periods)) or there[-1:]
    ]
    found = pa.concat_tables(parts)
    wanted = pc.greater(found["sequences"], 1)
    if merged:
        ended = pc.and_(pc.equal(found["event"], "merged"), pc.greater(found["size"], 1))
        wanted = pc.or_(wanted, ended)
    found = found.filter(wanted)
    for name in names:
        if not pc.any(pc.starts_with(found["campaign"], name)).as_py():
            raise DataError(f"no campaign of these periods is called {name}")
    if names:
        found = found.filter(
            pa.array([any(c.startswith(name) for name in names) for c in found["campaign"].to_pylist()])
        )
    return found


def _committed(workspace: Workspace, config: RunConfig, campaigns: pa.Table) -> dict[str, datetime]:
    """When the campaigns of each period were written."""
    table = workspace.table("campaigns")
    times = {
        period: table.committed({"run": config.run, "period": period})
        for period in campaigns["period"].unique().to_pylist()
    }
    return {period: time for period, time in times.items() if time is not None}


def _say_if_cut(campaigns: pa.Table) -> None:
    most = max((item["counts"] for item in campaigns["period"].value_counts().to_pylist()), default=0)
    if most > exports.MOST_NEAR:
        say(
            f"export: edges `near` are among the {exports.MOST_NEAR:,} campaigns with the most sources of a "
            f"period; there are up to {most:,}"
        )


def _members(workspace: Workspace, config: RunConfig, campaigns: pa.Table) -> pa.Table:
    parts = [MEMBERS.empty_table()]
    for period in campaigns["period"].unique().to_pylist():
        clusters = workspace.table("clusters").read({"run": config.run, "period": period})
        files = workspace.table("sequences").files({"period": period})
        columns = ("sequence_id", "src", "start", "end", "length")
        sequences = workspace.table("sequences").read_files(files, columns)
        of_period = campaigns.filter(pc.equal(campaigns["period"], period))
        parts.append(exports.members(sequences, clusters, of_period))
    return pa.concat_tables(parts)

"""`cluster`: a stage of a workspace, or the same solver on anybody's vectors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from rayscan.cli.options import EPILOG, method_option, model_option, stage_options
from rayscan.cli.stages import execute


@click.command(epilog=EPILOG)
@click.argument("vectors", type=click.Path(path_type=Path), required=False)
@click.option("--threshold", default="auto", show_default=True, help="VECTORS: a similarity, or auto.")
@click.option("--sweep", help="VECTORS: thresholds start:stop:step (without stop), or a list 0.2,0.4.")
@click.option("--out", type=click.Path(path_type=Path), help="VECTORS: Parquet file of labels to write.")
@click.option("--group", default="src", show_default=True, help="VECTORS: for auto, column of known groups.")
@click.option("--normalise", is_flag=True, help="VECTORS: divide each by its length first.")
@click.option("--seed", default=0, show_default=True, help="VECTORS: seed of the search.")
@model_option
@method_option
@partial(stage_options, workspace_required=False)
def cluster(vectors: Path | None, **options: Any) -> None:
    """Group sequences by correlation clustering: each period's, or the rows of a file.

    Without VECTORS, the periods of a workspace (settings: section `cluster`). With VECTORS, the rows of a
    Parquet file with a list column `vector`, or of a .npy matrix; no workspace is needed. Labels are written
    beside the other columns of the file, as column `cluster`, or `cluster@0.4` for each threshold of a sweep.
    A long sweep uses Ray.

    \b
      rayscan cluster vectors.parquet --threshold 0.4 --out labels.parquet
      rayscan cluster vectors.npy --sweep 0:1:0.01 --json
    """
    names = ("threshold", "sweep", "out", "group", "normalise", "seed")
    of_file = {name: options.pop(name) for name in names}
    if vectors is not None:
        _refuse(_OF_WORKSPACE, "is for a workspace, not for VECTORS")
        if of_file["sweep"] is not None:
            _refuse(("threshold",), "and --sweep exclude each other")
        if of_file["sweep"] is not None or of_file["threshold"] != "auto":
            _refuse(("group",), "is for --threshold auto")
        if of_file["sweep"] is None:
            _refuse(("address",), "is for --sweep; one threshold is solved in this process")
        _cluster_file(vectors, as_json=options["as_json"], address=options["address"], **of_file)
    elif options["workspace"] is None:
        raise click.UsageError("give a file of vectors, or a workspace with -w")
    else:
        _refuse(names, "is for VECTORS; for a workspace see `--set cluster.threshold=...`")
        execute(("cluster",), **options)


_OF_WORKSPACE = ("model", "method", "workspace", "preset", "config_file", "sets", "dry_run")


def _refuse(names: tuple[str, ...], why: str) -> None:
    """Usage error for the first of these options that stands on the command line, where it means nothing."""
    context = click.get_current_context()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[-1]} {why}")


def _cluster_file(
    path: Path,
    threshold: str,
    sweep: str | None,
    out: Path | None,
    group: str,
    normalise: bool,
    seed: int,
    as_json: bool,
    address: str | None,
) -> None:
    from rayscan import vectors
    from rayscan.progress import say, track

    thresholds = vectors.grid(sweep) if sweep is not None else []
    if not thresholds and threshold != "auto":
        thresholds = [vectors.number(threshold)]
    if out is not None:
        vectors.check_out(out, path)
    given = vectors.read(path, normalise)
    if not thresholds:
        found = vectors.calibrated(given, group, seed)
        say(f"threshold {found.threshold:.4f}, calibrated on column {group} (error {found.error:.3f})")
        thresholds = [found.threshold]
    n, d = given.values.shape
    say(f"cluster: {n:,} vectors of {d} dimensions")
    summaries, kept = [], []
    with track("cluster", len(thresholds), "thresholds") as advance:
        for one in vectors.partitions(given.values, thresholds, seed, address, partial(advance, 0)):
            summaries.append(one.summary())
            kept += [one] if out is not None else []
            advance(1, f"threshold {one.threshold:g}: {summaries[-1]['clusters']:,} clusters")
    if out is not None:
        for name in vectors.write(out, given, kept):
            say(f"column `{name}` of {path} is left out: the labels have its name")
    if as_json:
        click.echo(json.dumps(summaries, indent=1))
    else:
        _show_partitions(summaries)


def _show_partitions(summaries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("threshold", "points", "clusters", "singletons", "objective", "seconds", "largest"):
        table.add_column(name, justify="left" if name == "largest" else "right")
    for row in summaries:
        numbers = [f"{row[name]:,}" for name in ("points", "clusters", "singletons")]
        sizes = " ".join(f"{size:,}" for size in row["largest"][:5])
        table.add_row(
            f"{row['threshold']:g}", *numbers, f"{row['objective']:,.2f}", f"{row['seconds']:.2f}", sizes
        )
    Console(soft_wrap=True).print(table)

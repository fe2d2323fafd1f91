"""Other methods, to compare with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rayscan.cli.options import (
    EPILOG,
    address_option,
    config_options,
    json_option,
    show_rows,
    workspace_option,
)
from rayscan.config import RunConfig

_GRAPHS = ("gcn", "i-gcn", "gcn-gru", "i-gcn-gru")

_period_option = click.option(
    "--period", "periods", multiple=True, help="A period to compare on; may be repeated. [default: all]"
)
_seeds_option = click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of each method."
)


@click.command(epilog=EPILOG)
@click.option(
    "--methods",
    default="all",
    show_default=True,
    help="Names with commas between them, or all; docs/methods.md.",
)
@_period_option
@_seeds_option
@click.option(
    "--transductive",
    is_flag=True,
    help="Rate methods with one vector a source once more, learning from all sequences, as published.",
)
@workspace_option
@config_options
@address_option
@json_option
def compare(
    methods: str,
    periods: tuple[str, ...],
    seeds: int,
    transductive: bool,
    workspace: str,
    config: RunConfig,
    address: str | None,
    as_json: bool,
) -> None:
    """Rate rayscan's encoder and other published methods on the same sequences.

    Each method and seed is a Ray task; what is there already is not computed again. The embeddings that the
    workspace has by these settings are rated too, as "model ID". "-" stands for what a method cannot be rated
    on, such as telling that two sequences are of one source when it has one vector a source. Intervals are on
    the page, whose path comes last on stderr, and in the JSON.
    """
    from rayscan.methods.compare import as_rows, names_of

    wanted, left_out = names_of(_names(methods))
    from rayscan import planning
    from rayscan.lease import lease
    from rayscan.progress import say
    from rayscan.stages import compare as stage
    from rayscan.stages.session import session
    from rayscan.tables import Workspace

    place = Workspace.open(workspace)
    model = planning.find_model(place, config)
    for reason in left_out:
        say(f"left out: {reason}")
    with lease(place, f"compare-{config.run}"), session(config.resources, address):
        found = stage.run(place, config, model, wanted, periods, seeds, transductive)
    rows = as_rows(found)
    if as_json:
        click.echo(json.dumps({"table": rows, "runs": found}, indent=1))
    else:
        _show_table([{name: value for name, value in row.items() if name != "failed"} for row in rows])
    say(f"compare: {place.url(planning.run_file(config, stage.PAGE))}")
    sys.exit(1 if any(row["failed"] for row in rows) else 0)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _show_table(rows: list[dict[str, Any]]) -> None:
    """Plain text: wider than a narrow terminal, but whole."""
    lines = [
        [name.replace("_", " ") for name in rows[0]],
        *([_shown(value) for value in row.values()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *figures in lines:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        click.echo("  ".join([name.ljust(widths[0]), *cells]))


def _shown(value: Any) -> str:
    value = value["value"] if isinstance(value, dict) else value
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"
    return "-" if value is None else str(value)


@click.command(epilog=EPILOG)
@click.option(
    "--methods", default=",".join(_GRAPHS), show_default=True, help="Names with commas between them."
)
@_period_option
@click.option(
    "--first", type=click.IntRange(min=0), default=20, show_default=True, help="Days that are not scored."
)
@_seeds_option
@click.option(
    "--as-published",
    is_flag=True,
    help="With the authors' oddities: edges to predict are in the graph, windows of gcn-gru end a day early.",
)
@workspace_option
@config_options
@address_option
@json_option
def graphs(
    methods: str,
    periods: tuple[str, ...],
    first: int,
    seeds: int,
    as_published: bool,
    workspace: str,
    config: RunConfig,
    address: str | None,
    as_json: bool,
) -> None:
    """Score the graph methods by their authors' own protocol, day by day.

    Each day's hosts are told by their 3 nearest others, all sources being in the graph; the score is the
    macro-F1 over the labels of that day with more than 10 hosts, mean and deviation over the days after the
    first. "ports" is what the same vote reaches on flows per port alone.
    """
    wanted = _names(methods)
    unknown = [name for name in wanted if name not in _GRAPHS]
    if unknown:
        raise click.BadParameter(
            f"{unknown[0]!r} is no graph method; there are {', '.join(_GRAPHS)}", param_hint="--methods"
        )
    from rayscan.stages import graphs as stage
    from rayscan.stages.session import session
    from rayscan.tables import Workspace

    place = Workspace.open(workspace)
    with session(config.resources, address):
        found = stage.run(place, config, wanted, periods, seeds, first, as_published)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    _show_table(
        [{**{k: v for k, v in one.items() if k != "days"}, "days": len(one["days"])} for one in found]
    )


@click.command(epilog=EPILOG)
@click.option(
    "--csv",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Delimited text with a header line, also compressed.",
)
@click.option("--label-column", required=True, help="Column that says what a row is.")
@click.option(
    "--leave-out",
    "without",
    multiple=True,
    metavar="COLUMN",
    help="A column that is no feature; may be repeated.",
)
@click.option("--benign", default="benign", show_default=True, help="Label of the usual rows.")
@click.option("--few", default="", metavar="K,K,...", help="Train on with K labelled rows of each class too.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of pre-training.  [default: 300]")
@click.option("--seed", default=0, show_default=True, help="Seed of the split and of training.")
@json_option
def clan(
    path: Path,
    label_column: str,
    without: tuple[str, ...],
    benign: str,
    few: str,
    steps: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Tell attacks from benign flows by CLAN's own protocol, on any labelled table of flows.

    An encoder learns from half of the benign rows. Each other class is told from the other half: AUROC, as it
    is, also below 0.5. With --few, the encoder then learns classes from a few rows of each. Columns that say
    who or when, or are called like a label, are left out, and rows without a number in every column dropped;
    both are shown.

    \b
      rayscan clan --csv lycos.csv.gz --label-column label --few 8,64
    """
    ks = few.split(",") if few else []
    if not all(k.strip().isdecimal() and int(k) for k in ks):
        raise click.BadParameter(f"{few!r} is no list of numbers from 1 on, such as 8,16", param_hint="--few")
    from rayscan.captures.detect import open_capture
    from rayscan.config import CapturesConfig
    from rayscan.methods import anomaly
    from rayscan.methods.clan import Settings
    from rayscan.progress import say

    with path.open("rb") as file:
        _, stream = open_capture(file, str(path), CapturesConfig(format="csv"))
        rows = anomaly.read_rows(stream, str(path), label_column, without)
    settings = Settings() if steps is None else Settings(steps=steps)
    say(
        f"clan: {len(rows.labels):,} rows of {len(rows.names)} features; {rows.dropped:,} rows dropped that "
        f"lack a number or a label, {rows.ragged:,} lines unread that have another number of fields"
    )
    for name, reason in rows.left_out.items():
        say(f"column `{name}` is left out: it {reason}")
    found = anomaly.run(rows, benign, [int(k) for k in ks], seed, settings, anomaly.Tuning())
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _show_clan(found)
    sys.exit(3 if rows.ragged else 0)


def _show_clan(found: dict[str, Any]) -> None:
    zero_day = found["zero_day"]
    classes = [
        {"class": name, "rows": found["classes"][name], "auroc": f"{value:.4f}",
         "": "zero-day" if name in zero_day else ""}
        for name, value in found["auroc"].items()
    ]  # fmt: skip
    attacks = sum(row["rows"] for row in classes)
    show_rows(
        [*classes, {"class": "mean", "rows": attacks, "auroc": f"{found['mean_auroc']:.4f}", "": ""}], False
    )
    if found["few"]:
        click.echo()
        rows = [
            {"rows of each class": int(k), **{name: f"{value:.4f}" for name, value in scores.items()}}
            for k, scores in found["few"].items()
        ]
        show_rows(rows, False)

"""The command line: each command a few lines over `pipeline.py`.

Text for people goes to stderr, data to stdout. Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do. Heavy libraries are imported when a command needs them,
so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import rayscan
from rayscan import config as configuration
from rayscan.config import RunConfig
from rayscan.errors import RayscanError

if TYPE_CHECKING:
    from rayscan.tables import Workspace

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do."""


class _Group(click.Group):
    """Shows expected errors without a traceback, and suggests the nearest command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayscanError as error:
            click.echo(f"rayscan: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("rayscan: stopped; what was committed stays, run again to go on", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the pipeline


@click.group(cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rayscan.__version__, prog_name="rayscan")
def main() -> None:
    """Which sources of a network telescope behave alike, and who belongs to one campaign.

    `rayscan run` does everything that is due, from captures to a report, and nothing twice. The commands
    named after a stage do that stage alone. Try it on simulated traffic:

    \b
      rayscan simulate /tmp/telescope
      rayscan run -w /tmp/ws --preset quick --set captures.paths=/tmp/telescope/captures
    """


def _config_options(function: F) -> F:
    options = [
        click.option(
            "--preset",
            default="default",
            show_default=True,
            envvar="RAYSCAN_PRESET",
            help=f"Settings to start from: {', '.join(configuration.preset_names())}.",
        ),
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            envvar="RAYSCAN_CONFIG",
            help="YAML file of settings, over the preset.",
        ),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="One setting, over everything else; may be repeated. `rayscan config schema` lists them.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _workspace_option(function: F, required: bool = True) -> F:
    return click.option(
        "-w",
        "--workspace",
        required=required,
        envvar="RAYSCAN_WORKSPACE",
        help="Folder or s3://bucket/prefix of the tables, models and reports.",
    )(function)


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(
        function
    )


_address_option = click.option(
    "--address",
    envvar="RAYSCAN_ADDRESS",
    help="Ray cluster to use (default: RAY_ADDRESS, else a local Ray is started).",
)


def _stage_options(function: F, workspace_required: bool = True) -> F:
    options: list[Callable[[F], F]] = [
        partial(_workspace_option, required=workspace_required),
        _config_options,
        _address_option,
        _json_option,
        click.option("--dry-run", is_flag=True, help="Show what is due and change nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


_model_option = click.option(
    "--model",
    help="Use this model: its id in the workspace, or a folder or s3:// prefix, which is copied there.",
)
_from_option = click.option(
    "--from",
    "start",
    metavar="MODEL",
    help="Train on from this model (id or folder) instead of from random weights, and measure the drift.",
)


# ---------------------------------------------------------------------------------------------
# a telescope to try things on
# ---------------------------------------------------------------------------------------------


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--months", default=3, show_default=True, help="Months of traffic.")
@click.option("--start", default="2024-01-01", show_default=True, help="First day, UTC.")
@click.option("--sources", default=2000, show_default=True, help="Sources over all months.")
@click.option("--flows", default=500_000, show_default=True, help="Flows over all months.")
@click.option("--prefix", default="198.18.0.0/16", show_default=True, help="The telescope's addresses.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--every", type=click.Choice(["month", "day"]), default="month", help="One file a ...")
@click.option("--pcap", is_flag=True, help="Write packet captures instead of Parquet.")
@_json_option
def simulate(folder: Path, as_json: bool, **options: Any) -> None:
    """Write captures of a telescope whose campaigns are known, into FOLDER.

    FOLDER/captures is what to ingest. FOLDER/truth.parquet says which source belongs to which campaign.
    """
    from rayscan.progress import say, track
    from rayscan.simulate import simulate_to

    with track("simulate", options["flows"], "flows") as advance:
        done = 0

        def progress(file: str, written: int, _: int) -> None:
            nonlocal done
            advance(written - done, file)
            done = written

        made = simulate_to(folder, **options, progress=progress)
    say(
        f"simulate: {made.flows:,} flows of {made.sources:,} sources in {made.campaigns} campaigns, "
        f"{len(made.files)} files, {made.bytes / 1e6:,.1f} MB"
    )
    if as_json:
        facts = {name: getattr(made, name) for name in ("flows", "sources", "campaigns", "bytes")}
        facts |= {"captures": str(made.captures), "truth": str(made.truth)}
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(made.captures)


# ---------------------------------------------------------------------------------------------
# run and its stages
# ---------------------------------------------------------------------------------------------


def _execute(
    stages: tuple[str, ...],
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    address: str | None,
    as_json: bool,
    dry_run: bool,
    fresh: bool = False,
    model: str | None = None,
    start: str | None = None,
) -> None:
    config = configuration.load(preset, config_file, sets)
    from rayscan import models, pipeline, planning
    from rayscan.tables import Workspace

    place = Workspace(str(workspace) if "://" in workspace else str(Path(workspace).expanduser().absolute()))
    found = None if model is None else models.named(place, model)
    begun = None if start is None else models.named(place, start)
    config = config if found is None else models.using(config, found)
    config = config if begun is None else models.starting_from(config, begun)
    if dry_run:
        _show_status(pipeline.plan(workspace, config, found.model if found else None), as_json, stages)
        return
    if config.captures.paths:
        planning.find_captures(config.captures, workspace)  # says what is missing before anything is made
    opened = Workspace.open(workspace, config.ingest if config.captures.paths else None)
    for one in (found, begun):
        if one is not None:
            models.bring_in(opened, one)
    outcome = pipeline.Run(opened, config, address).execute(stages, fresh)
    if outcome.exit_code == pipeline.NOTHING_TO_DO:
        click.echo(f"nothing to do: everything in {opened.uri} is up to date", err=True)
    if as_json:
        click.echo(json.dumps(asdict(outcome), indent=1))
    elif "report" in stages and outcome.report:
        click.echo("the report:", err=True)
        click.echo(outcome.report)
    sys.exit(outcome.exit_code)


@main.command("run", epilog=_EPILOG)
@_model_option
@_from_option
@_stage_options
def run_command(**options: Any) -> None:
    """Do everything that is due, from captures to the report.

    Finished work is never done twice: run it again after a crash, after new captures, or with other
    settings, and only what they touch is done.
    """
    from rayscan.planning import STAGES

    _execute(STAGES, **options)


_format_option = click.option(
    "--format",
    "capture_format",
    help="Format of all captures, where their content is ambiguous (captures.format).  [default: auto]",
)


def _with_captures(
    sets: tuple[str, ...], paths: tuple[str, ...], capture_format: str | None
) -> tuple[str, ...]:
    """`--set` items, with those that stand for captures given as arguments."""
    if paths:
        sets += (f"captures.paths={json.dumps(paths, ensure_ascii=False)}",)
    return sets if capture_format is None else (*sets, f"captures.format={capture_format}")


@main.command(epilog=_EPILOG)
@click.argument("captures", nargs=-1)
@_format_option
@_stage_options
def ingest(
    captures: tuple[str, ...], capture_format: str | None, sets: tuple[str, ...], **options: Any
) -> None:
    """Read captures into the flows table.

    CAPTURES are files, folders, s3:// prefixes or quoted patterns, in place of captures.paths. A capture is
    known by its content: given twice it counts once, corrected it replaces the old one. What cannot be read
    is counted in the rejects table, and the exit code is 3.

    \b
      rayscan ingest -w /data/ws '/data/telescope/2024-*/**/*.pcap.gz'
      rayscan ingest -w s3://bucket/ws s3://bucket/telescope/2024-03 --format csv
    """
    _execute(("ingest",), sets=_with_captures(sets, captures, capture_format), **options)


@main.command()
@click.argument("captures", nargs=-1, required=True)
@click.option("--rows", type=click.IntRange(min=1), help="Stop after about this many rows of each capture.")
@_format_option
@_config_options
@_json_option
def inspect(
    captures: tuple[str, ...],
    rows: int | None,
    capture_format: str | None,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what captures hold and how they are read, without ingesting them.

    CAPTURES as for `rayscan ingest`. Of one, everything is shown: format, time span, rejects, addresses,
    ports, and which columns it records or lacks; of several, a line each and then all of them together. The
    exit code is 3 if something could not be read.
    """
    config = configuration.load(preset, config_file, _with_captures(sets, captures, capture_format))
    from rayscan import inspect as inspection
    from rayscan.planning import find_captures
    from rayscan.progress import track

    files = find_captures(config.captures)
    results = []
    with track("inspect", len(files), "captures") as advance:
        for result in inspection.inspect(files, config, rows):
            results.append(result)
            advance(1, result.path)
    if as_json:
        facts = {"captures": [result.facts() for result in results]}
        click.echo(json.dumps({**facts, "together": inspection.together(results).facts()}, indent=1))
    else:
        inspection.show(results)
    sys.exit(0 if all(result.whole for result in results) else 3)


@main.command(epilog=_EPILOG)
@_stage_options
def sequences(**options: Any) -> None:
    """Cut each source's flows into sequences."""
    _execute(("sequences",), **options)


@main.command(epilog=_EPILOG)
@click.option("--fresh", is_flag=True, help="Train again, in place of the model that these settings have.")
@_from_option
@_stage_options
def train(**options: Any) -> None:
    """Train the encoder on sequences, without labels.

    A killed training goes on from its last checkpoint when it is started again. With --from, the model of an
    earlier period is trained on; how well it separates the new data before and after stands beside the new
    model (drift.json):

    \b
      rayscan train -w WS --from 3f0c5a1b9d2e4f60 --set train.periods=2024-03 --set train.steps=300
    """
    _execute(("train",), **options)


@main.command(epilog=_EPILOG)
@_stage_options
def tune(
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    address: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Try settings on the workspace's sequences and write down the best.

    What to vary stands in section `tune`. Trials train for a few steps, the best of them for several times as
    many, and so on up to train.steps. They are ranked by how well they separate sources that training has not
    seen. Prints the path of the best settings, a file for `rayscan train --config`. A sweep that was killed
    goes on where it was.

    \b
      rayscan tune -w WS --set 'tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}'
    """
    config = configuration.load(preset, config_file, sets)
    from rayscan import pipeline
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    if dry_run:
        click.echo(json.dumps(pipeline.plan_tune(opened, config), indent=1))
        return
    code, facts = pipeline.tune(opened, config, address)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        changed = ", ".join(f"{path} {value}" for path, value in facts["best"].items())
        what = "nothing to do: this sweep is done" if code == pipeline.NOTHING_TO_DO else facts["status"]
        click.echo(f"tune: {what}; best of {facts['trials']} trials: {changed or 'unchanged'}", err=True)
        figures = [facts["separation"], facts["separation_unchanged"]]
        best, unchanged = ("failed" if x is None else f"{x:.4f}" for x in figures)
        click.echo(f"separation {best}; settings unchanged {unchanged}; see {facts['page']}", err=True)
        click.echo(facts["config"])
    sys.exit(code)


@main.command(epilog=_EPILOG)
@_model_option
@_stage_options
def embed(**options: Any) -> None:
    """Turn every sequence into a vector with the trained model."""
    _execute(("embed",), **options)


@main.command(epilog=_EPILOG)
@click.argument("vectors", type=click.Path(path_type=Path), required=False)
@click.option("--threshold", default="auto", show_default=True, help="VECTORS: a similarity, or auto.")
@click.option("--sweep", help="VECTORS: thresholds start:stop:step (without stop), or a list 0.2,0.4.")
@click.option("--out", type=click.Path(path_type=Path), help="VECTORS: Parquet file of labels to write.")
@click.option("--group", default="src", show_default=True, help="VECTORS: for auto, column of known groups.")
@click.option("--normalise", is_flag=True, help="VECTORS: divide each by its length first.")
@click.option("--seed", default=0, show_default=True, help="VECTORS: seed of the search.")
@_model_option
@partial(_stage_options, workspace_required=False)
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
        _cluster_file(vectors, as_json=options["as_json"], address=options["address"], **of_file)
    elif options["workspace"] is None:
        raise click.UsageError("give a file of vectors, or a workspace with -w")
    else:
        _refuse(names, "is for VECTORS; for a workspace see `--set cluster.threshold=...`")
        _execute(("cluster",), **options)


_OF_WORKSPACE = ("model", "workspace", "preset", "config_file", "sets", "dry_run")


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


@main.command(epilog=_EPILOG)
@_model_option
@_stage_options
def campaigns(**options: Any) -> None:
    """Follow clusters from period to period: born, continued, split, merged, gone."""
    _execute(("campaigns",), **options)


@main.command(epilog=_EPILOG)
@_model_option
@_stage_options
def evaluate(**options: Any) -> None:
    """Measure how well similarity tells sources apart, and clusters against labels."""
    _execute(("evaluate",), **options)


@main.command(epilog=_EPILOG)
@click.option(
    "--methods",
    default="all",
    show_default=True,
    help="Names with commas between them, or all; docs/methods.md.",
)
@click.option(
    "--period", "periods", multiple=True, help="A period to compare on; may be repeated. [default: all]"
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of each method."
)
@_workspace_option
@_config_options
@_address_option
@_json_option
def compare(
    methods: str,
    periods: tuple[str, ...],
    seeds: int,
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    address: str | None,
    as_json: bool,
) -> None:
    """Rate other published methods on the same sequences, beside the workspace's own embeddings.

    Each method and seed is a Ray task; what is there already is not computed again. "-" stands for what a
    method cannot be rated on, such as telling that two sequences are of one source when it has one vector a
    source.
    """
    from rayscan.methods.compare import as_rows, names_of

    config = configuration.load(preset, config_file, sets)
    wanted = names_of([name.strip() for name in methods.split(",")])
    from rayscan import planning
    from rayscan.stages import compare as stage
    from rayscan.stages.session import session
    from rayscan.tables import Workspace

    place = Workspace.open(workspace)
    with session(config.resources, address):
        found = stage.run(place, config, planning.find_model(place, config), wanted, periods, seeds)
    rows = as_rows(found)
    if as_json:
        click.echo(json.dumps({"table": rows, "runs": found}, indent=1))
        return
    lines = [
        [name.replace("_", " ") for name in rows[0]],
        *(list(map(_compared, row.values())) for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *figures in lines:  # plain text: wider than a narrow terminal, but whole
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        click.echo("  ".join([name.ljust(widths[0]), *cells]))


def _compared(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"
    return "-" if value is None else str(value)


@main.command(epilog=_EPILOG)
@_model_option
@_stage_options
def report(**options: Any) -> None:
    """Write the HTML report of a run and print its path."""
    _execute(("report",), **options)


@main.command(epilog=_EPILOG)
@click.option(
    "--csv",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Delimited text with a header line, also compressed.",
)
@click.option("--label-column", required=True, help="Column that says what a row is.")
@click.option("--benign", default="benign", show_default=True, help="Label of the usual rows.")
@click.option("--few", default="", metavar="K,K,...", help="Train on with K labelled rows of each class too.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of pre-training.  [default: 300]")
@click.option("--seed", default=0, show_default=True, help="Seed of the split and of training.")
@_json_option
def clan(
    path: Path, label_column: str, benign: str, few: str, steps: int | None, seed: int, as_json: bool
) -> None:
    """Tell attacks from benign flows by CLAN's own protocol, on any labelled table of flows.

    An encoder learns from half of the benign rows. Each other class is told from the other half: AUROC, as it
    is, also below 0.5. With --few, the encoder then learns classes from a few rows of each. Columns that say
    who or when are left out, and rows without a number in every column dropped; both are shown.

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
        rows = anomaly.read_rows(stream, str(path), label_column)
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
    _show_rows(
        [*classes, {"class": "mean", "rows": attacks, "auroc": f"{found['mean_auroc']:.4f}", "": ""}], False
    )
    if found["few"]:
        click.echo()
        rows = [
            {"rows of each class": int(k), **{name: f"{value:.4f}" for name, value in scores.items()}}
            for k, scores in found["few"].items()
        ]
        _show_rows(rows, False)


# ---------------------------------------------------------------------------------------------
# looking and keeping
# ---------------------------------------------------------------------------------------------


@main.command()
@_workspace_option
@_config_options
@_json_option
def status(
    workspace: str, preset: str, config_file: Path | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Show per stage and period what is done, due and stale, with row counts.

    Without any settings, those of the last run `main` are taken: what would running it again do?
    """
    from rayscan import pipeline
    from rayscan.tables import Workspace

    config = configuration.load(preset, config_file, sets)
    opened = Workspace.open(workspace)
    if config == configuration.load():
        config = _last_settings(opened, config)
    _show_status(pipeline.status(opened, config), as_json)
    if not as_json:
        _show_last_run(opened, config)


def _last_settings(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The settings of the last run of this name, or `config` where there was none."""
    from rayscan.planning import run_file

    path = run_file(config, "config.yaml")
    try:
        return configuration.from_yaml(workspace.read_bytes(path).decode(), workspace.url(path))
    except FileNotFoundError:
        return config


def _show_status(rows: list[dict[str, Any]], as_json: bool, stages: tuple[str, ...] | None = None) -> None:
    rows = [row for row in rows if stages is None or row["stage"] in stages]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "period"):
        table.add_column(name)
    for name in ("done", "due", "stale", "rows"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = [f"{row[name]:,}" if row[name] else "" for name in ("done", "due", "stale", "rows")]
        table.add_row(row["stage"], row["period"], *counts)
    Console(soft_wrap=True).print(table)


def _show_last_run(workspace: Workspace, config: RunConfig) -> None:
    from rayscan.planning import run_file

    last = workspace.read_json(run_file(config, "run.json"))
    if last is not None:
        error = f" ({last['error']})" if last["error"] else ""
        click.echo(
            f"\nlast run {last['run_id']}: {last['status']}{error}, finished {last['finished']}", err=True
        )


@main.command()
@_workspace_option
@click.option(
    "--older-than",
    "hours",
    default=168.0,
    show_default=True,
    help="Hours a file must have been unused. Shorter than a running job endangers that job.",
)
@click.option("--dry-run", is_flag=True, help="List the files and delete none.")
def vacuum(workspace: str, hours: float, dry_run: bool) -> None:
    """Delete files that no table uses any more, leftovers of crashes too. Prints their paths."""
    from rayscan.tables import TABLE_NAMES, Workspace

    opened = Workspace.open(workspace)
    count = 0
    for name in TABLE_NAMES:
        for path in opened.table(name).vacuum(hours, dry_run):
            click.echo(f"{name}/{path}")
            count += 1
    click.echo(f"{count:,} files {'would be' if dry_run else 'were'} deleted", err=True)


@main.group("scanners")
def scanners_group() -> None:
    """Lists of known scanners, which the report and `evaluate.labels` name sources by.

    Lists age, so each entry is dated, and traffic is looked up with its own date: see the setting
    scanners.tolerance_days. A new list makes campaigns, evaluation and report stale, and nothing before.
    """


_DAY = click.DateTime(["%Y-%m-%d"])


@scanners_group.command("import", epilog=_EPILOG)
@_workspace_option
@click.argument("files", nargs=-1, required=True)
@click.option("--source", help="Whose list it is (default: the file's name; Parquet says it by itself).")
@click.option("--organisation", help="Who scans, where the list does not say, or in place of what it says.")
@click.option("--from", "valid_from", type=_DAY, help="First day for which the list vouches, YYYY-MM-DD.")
@click.option("--to", "valid_to", type=_DAY, help="Last such day (default: as --from).")
@_json_option
def scanners_import(
    workspace: str,
    files: tuple[str, ...],
    source: str | None,
    organisation: str | None,
    valid_from: datetime | None,
    valid_to: datetime | None,
    as_json: bool,
) -> None:
    """Add lists of known scanners to a workspace.

    Read are ipset, plain addresses and CIDR, nftables sets, MISP warninglists, NICTER's JSON, and Parquet
    with columns net, len, org, source, as_of; also compressed. The content tells which. A list without a
    date of its own needs --from; a list that is there already changes nothing.

    \b
      rayscan scanners import -w WS censys.ipset --from 2024-11-01
      rayscan scanners import -w WS ranges.txt.gz --organisation shodan --from 2023-01-01 --to 2023-12-31
    """
    from rayscan.captures.scanner_lists import Given
    from rayscan.progress import say
    from rayscan.stages.lists import import_list
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    days = [None if day is None else day.date() for day in (valid_from, valid_to)]
    results = []
    for file in files:
        given = Given(source or Path(file).name, organisation, *days)
        made = import_list(opened, file, given)
        listed = made.listed
        results.append(
            {
                "file": file, "list": made.list, "new": made.new, "form": listed.form,
                "networks": listed.entries.num_rows, "ipv6": listed.ipv6, "bad": listed.bad,
            }
        )  # fmt: skip
        what = f"{listed.entries.num_rows:,} networks, dated by {listed.dates}"
        skipped = f"; {listed.ipv6:,} IPv6 networks left out" if listed.ipv6 else ""
        wrong = f"; {listed.bad:,} are no network ({', '.join(listed.examples)})" if listed.bad else ""
        state = "" if made.new else "; there already: nothing to do"
        say(f"{file}: list {made.list}, {listed.form}, {what}{skipped}{wrong}{state}")
    if as_json:
        click.echo(json.dumps(results, indent=1))
    new, bad = any(one["new"] for one in results), any(one["bad"] for one in results)
    sys.exit(3 if bad else 0 if new else 4)


@scanners_group.command("list")
@_workspace_option
@_json_option
def scanners_list(workspace: str, as_json: bool) -> None:
    """Show the lists of a workspace: networks, organisations, and the days for which they vouch."""
    from rayscan.stages.lists import overview
    from rayscan.tables import Workspace

    _show_rows(overview(Workspace.open(workspace)).to_pylist(), as_json)


@scanners_group.command("remove")
@_workspace_option
@click.argument("name", metavar="LIST")
def scanners_remove(workspace: str, name: str) -> None:
    """Take a list out of a workspace; `rayscan scanners list` shows the names."""
    from rayscan.progress import say
    from rayscan.stages.lists import remove_list
    from rayscan.tables import Workspace

    say(f"list {name}: {remove_list(Workspace.open(workspace), name):,} networks removed")


@scanners_group.command("lookup")
@_workspace_option
@_config_options
@click.argument("address")
@click.option("--date", "day", type=_DAY, help="Day of the traffic: show the entry that counts then.")
@_json_option
def scanners_lookup(
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    address: str,
    day: datetime | None,
    as_json: bool,
) -> None:
    """Show which lists know an address: all entries, or with --date the one that counts on that day."""
    from rayscan.stages.lists import lookup
    from rayscan.tables import Workspace

    config = configuration.load(preset, config_file, sets)
    rows = lookup(Workspace.open(workspace), config, address, None if day is None else day.date())
    if not rows and not as_json:
        click.echo(f"no list knows {address}" + (" on that day" if day else ""), err=True)
        return
    _show_rows(rows, as_json)


def _show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items() if rows else ():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else escape(str(value)) for value in row.values())
        table.add_row(*cells)
    Console(soft_wrap=True).print(table)


@main.group("config")
def config_group() -> None:
    """Show, check and describe settings.

    Settings come, from weakest to strongest, from their defaults, a preset, a file, environment variables
    (RAYSCAN_TRAIN__STEPS=500) and --set train.steps=500.
    """


@config_group.command("show")
@_config_options
def config_show(preset: str, config_file: Path | None, sets: tuple[str, ...]) -> None:
    """Print the merged settings as YAML."""
    click.echo(configuration.as_yaml(configuration.load(preset, config_file, sets)), nl=False)


@config_group.command("validate")
@_config_options
def config_validate(preset: str, config_file: Path | None, sets: tuple[str, ...]) -> None:
    """Check the settings; the exit code is 2 and the error names the setting if they are wrong."""
    from rayscan.planning import config_hash

    found = configuration.load(preset, config_file, sets)
    click.echo(f"the settings are valid; hash {config_hash(found)}", err=True)


@config_group.command("schema")
def config_schema() -> None:
    """Print the JSON schema of all settings, with descriptions, units and ranges."""
    click.echo(json.dumps(RunConfig.model_json_schema(), indent=1))

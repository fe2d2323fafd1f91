"""`run`, and the stages one at a time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rayscan.cli.options import EPILOG, from_option, method_option, model_option, stage_options
from rayscan.cli.workspace import show_status
from rayscan.config import RunConfig

if TYPE_CHECKING:
    from rayscan.planning import Window
    from rayscan.tables import Workspace


def execute(
    stages: tuple[str, ...],
    workspace: str,
    config: RunConfig,
    address: str | None,
    as_json: bool,
    dry_run: bool,
    fresh: bool = False,
    model: str | None = None,
    start: str | None = None,
    period: str | None = None,
    window: Window | None = None,
) -> None:
    from rayscan import models, pipeline, planning
    from rayscan.status import plan
    from rayscan.tables import Workspace

    place = Workspace.at(workspace)
    found = None if model is None else models.named(place, model)
    begun = None if start is None else models.named(place, start)
    config = config if found is None else models.using(config, found)
    config = config if begun is None else models.starting_from(config, begun)
    if dry_run:
        rows = plan(workspace, config, found.model if found else None)
        if window is not None:
            rows = [row for row in rows if not row["period"] or window.holds(row["period"])]
        show_status(rows, as_json, stages)
        return
    if config.captures.paths:
        planning.find_captures(config.captures, place.uri)  # says what is missing before anything is made
    opened = Workspace.open(workspace, config.ingest if config.captures.paths else None)
    for one in (found, begun):
        if one is not None:
            models.bring_in(opened, one)
    outcome = pipeline.Run(opened, config, address, window).execute(stages, fresh, period)
    if outcome.exit_code == pipeline.NOTHING_TO_DO:
        click.echo(f"nothing to do: everything in {opened.uri} is up to date", err=True)
        _show_figures(opened, config, stages)
    if as_json:
        click.echo(json.dumps(asdict(outcome), indent=1))
    elif "report" in stages and outcome.report:
        click.echo("the report:", err=True)
        click.echo(outcome.report)
    elif outcome.changes:
        click.echo("what changed:", err=True)
        click.echo(outcome.changes)
    sys.exit(outcome.exit_code)


def _show_figures(workspace: Workspace, config: RunConfig, stages: tuple[str, ...]) -> None:
    """What an evaluation that is there already has found: whoever asks for it wants to see it."""
    from rayscan import planning
    from rayscan.evaluation import paper, table

    shown = {("evaluate",): (planning.EVALUATION, table.as_text), ("paper",): (planning.PAPER, paper.as_text)}
    if stages in shown:
        name, as_text = shown[stages]
        found = workspace.read_json(planning.run_file(config, name))
        for line in as_text(found) if found else ():
            click.echo(line, err=True)


@click.command("run", epilog=EPILOG)
@model_option
@method_option
@from_option
@stage_options
def run_command(**options: Any) -> None:
    """Do everything that is due, from captures to the report.

    Finished work is never done twice: run it again after a crash, after new captures, or with other
    settings, and only what they touch is done.
    """
    from rayscan.planning import STAGES

    execute(STAGES, **options)


@click.command(epilog=EPILOG)
@stage_options
def sequences(**options: Any) -> None:
    """Cut each source's flows into sequences."""
    execute(("sequences",), **options)


@click.command(epilog=EPILOG)
@click.option("--fresh", is_flag=True, help="Train again, in place of the model that these settings have.")
@from_option
@method_option
@stage_options
def train(**options: Any) -> None:
    """Train the encoder on sequences, without labels; or with --method what else is to embed them.

    A killed training goes on from its last checkpoint when it is started again. With --from, the model of an
    earlier period is trained on; how well it separates the new data before and after stands beside the new
    model (drift.json):

    \b
      rayscan train -w WS --from 3f0c5a1b9d2e4f60 --set train.periods=2024-03 --set train.steps=300
    """
    execute(("train",), **options)


@click.command(epilog=EPILOG)
@stage_options
def tune(workspace: str, config: RunConfig, address: str | None, as_json: bool, dry_run: bool) -> None:
    """Try settings on the workspace's sequences and write down the best.

    What to vary stands in section `tune`. Trials train for a few steps, the best of them for several times as
    many, and so on up to train.steps. They are ranked by how well they separate sources that training has not
    seen. Prints the path of the best settings, a file for `rayscan train --config`. A sweep that was killed
    goes on where it was.

    \b
      rayscan tune -w WS --set 'tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}'
    """
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


@click.command(epilog=EPILOG)
@model_option
@method_option
@stage_options
def embed(**options: Any) -> None:
    """Turn every sequence into a vector with the trained model."""
    execute(("embed",), **options)


@click.command(epilog=EPILOG)
@model_option
@method_option
@stage_options
def campaigns(**options: Any) -> None:
    """Follow clusters from period to period: born, continued, split, merged, gone."""
    execute(("campaigns",), **options)


@click.command(epilog=EPILOG)
@click.option(
    "--protocol",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="The evaluation of a run, or that of the paper; docs/evaluation.md.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Train, embed and evaluate with so many seeds from train.seed on.",
)
@model_option
@method_option
@stage_options
def evaluate(protocol: str, seeds: int, **options: Any) -> None:
    """Measure how well similarity tells sources apart, and clusters against labels.

    Prints a table; runs/RUN/evaluation.json has every figure with its interval. --protocol paper follows
    arXiv 2606.04733 instead (settings: section `paper`): similarities of anchors by source and by label, and
    clusters at 100 thresholds against labels, into runs/RUN/evaluation-paper.json and tsne-PART.parquet.
    --seeds says how far figures move with the seed of training: runs/RUN/evaluation-seeds.json.

    \b
      rayscan evaluate -w WS
      rayscan evaluate -w WS --protocol paper --set paper.solver=moves
    """
    if seeds > 1:
        if protocol == "paper" or options["model"] or options["dry_run"]:
            raise click.UsageError("--seeds trains models; it goes with no --protocol, --model or --dry-run")
        _evaluate_seeds(seeds, **options)
    else:
        execute(("paper",) if protocol == "paper" else ("evaluate",), **options)


def _evaluate_seeds(
    count: int, workspace: str, config: RunConfig, address: str | None, as_json: bool, **_: Any
) -> None:
    from rayscan import pipeline
    from rayscan.tables import Workspace

    rows = pipeline.evaluate_seeds(Workspace.open(workspace), config, count, address)
    if as_json:
        click.echo(json.dumps(rows, indent=1))


@click.command(epilog=EPILOG)
@click.option("--period", help="Report on this period alone, beside the report on all: report-PERIOD.html.")
@model_option
@method_option
@stage_options
def report(**options: Any) -> None:
    """Write the HTML report of a run and print its path."""
    execute(("report",), **options)

"""Does the model still fit? Its separation on new periods, beside that on its own data.

One task embeds the validation sources of these periods, which the model has never seen; nothing is kept but
the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayscan.config import RunConfig
from rayscan.model import artefact
from rayscan.model.embed import device_of
from rayscan.model.fit import separation
from rayscan.planning import Model
from rayscan.stages.feeding import read_validation
from rayscan.stages.session import run_tasks, share_of_cores
from rayscan.tables import File, Workspace


@dataclass(frozen=True)
class Drift:
    """Separation of a model on its own data `then` and on these periods `now`; None where not measured."""

    model: str
    periods: list[str]
    sources: int
    then: float | None
    now: float | None
    drifted: bool
    same_split: bool  # False: the model may have seen the sources that it is measured on


def run(workspace: Workspace, config: RunConfig, model: Model, periods: list[str]) -> Drift:
    """Measure a model on the validation sources of these periods."""
    files = [file for file in workspace.table("sequences").files() if file.key["period"] in periods]

    def work(files: list[File]) -> tuple[int, float | None]:
        return _measure(workspace, config, model, files)

    resources = config.resources
    options: dict[str, Any] = {"cpus": resources.embed_cpus, "gpus": resources.embed_gpus}
    ((_, (sources, now)),) = run_tasks(work, [files], **options)
    then = model.card.get("metrics", {}).get("separation")
    settings, split = config.reprocess, model.card.get("training", {}).get("split")
    enough = now is not None and then is not None and sources >= settings.min_sources
    return Drift(
        model.id,
        periods,
        sources,
        then,
        now,
        bool(enough and then - now > settings.drift),
        split == config.split.model_dump(mode="json"),
    )


def _measure(
    workspace: Workspace, config: RunConfig, model: Model, files: list[File]
) -> tuple[int, float | None]:
    encoder, _ = artefact.load(lambda name: workspace.read_bytes(f"{model.folder}/{name}"))
    own = config.model_copy(update={"model": encoder.config})
    torch.set_num_threads(share_of_cores(config.embed.threads, 1, config.resources.embed_cpus))
    sample = read_validation(workspace, own, files)
    if sample is None:
        return 0, None
    device = device_of(
        "cpu" if config.embed.device == "cpu" else "auto"
    )  # the driver's machine may have none
    found = separation(encoder.to(device), sample, device, config.embed.precision)
    return len(np.unique(sample.src)), found

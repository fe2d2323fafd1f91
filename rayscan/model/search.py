"""What a sweep tries and for how long: settings drawn at random, and the rungs of successive halving.

Jamieson and Talwalkar, Non-stochastic best arm identification (2016): all trials train for a few steps, the
best share of them goes on for several times as many, and so forth. Draws depend on nothing but the seed, and
a rung is decided when all of its trials are through: a sweep that was killed, or that runs on other machines,
takes the same decisions. (Deciding as results come in, as ASHA does, keeps machines busier
and makes the outcome hang on who was faster.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from rayscan.config import Dimension, RunConfig, digest
from rayscan.errors import ConfigError


@dataclass(frozen=True)
class Trial:
    """Settings to try. `values` holds those that were drawn, by their path; trial 0 has none."""

    number: int
    values: dict[str, Any]
    config: RunConfig


def draw(config: RunConfig) -> list[Trial]:
    """The unchanged settings, and up to `tune.trials` − 1 others: no two alike, all of them valid.

    Fewer where the space has no more. Raises ConfigError if there is no space, or nothing valid in it.
    """
    tune = config.tune
    if not tune.space:
        raise ConfigError(
            "tune.space is empty: say what to vary, e.g. {train.learning_rate: {loguniform: [1e-4, 1e-2]}}"
        )
    trials = [Trial(0, {}, config)]
    seen = {digest(config.model, config.train)}
    why = "all of it equals the settings that are there"
    for attempt in range(100 * tune.trials):
        rng = np.random.default_rng([tune.seed % 2**63, attempt])
        values = {path: _value(rng, dimension) for path, dimension in sorted(tune.space.items())}
        try:
            changed = with_values(config, values)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            continue
        key = digest(changed.model, changed.train)
        if key not in seen:
            seen.add(key)
            trials.append(Trial(len(trials), values, changed))
        if len(trials) == tune.trials:
            break
    if len(trials) == 1:
        raise ConfigError(f"tune.space holds nothing to try: {why}")
    return trials


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The settings with some of them replaced, checked. Raises pydantic's ValidationError."""
    changed = {}
    for name in ("model", "train"):
        section = getattr(config, name)
        mine = {path.partition(".")[2]: x for path, x in values.items() if path.startswith(f"{name}.")}
        changed[name] = type(section).model_validate({**section.model_dump(), **mine})
    return config.model_copy(update=changed)


def _value(rng: np.random.Generator, dimension: Dimension) -> Any:
    """A value; numbers have four significant digits, which is as many as one would type."""
    if dimension.choice is not None:
        return dimension.choice[int(rng.integers(len(dimension.choice)))]
    low, high = dimension.values
    if dimension.integer is not None:
        return int(rng.integers(low, high, endpoint=True))
    if dimension.loguniform is not None:
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{rng.uniform(low, high):.4g}")


def rungs(steps: int, first: int, reduction: int) -> list[int]:
    """Steps at the end of each rung, ascending; the last is `steps`, none is below `first` before it."""
    ends = [steps]
    while ends[0] // reduction >= first:
        ends.insert(0, ends[0] // reduction)
    return ends


def keep(separations: Mapping[int, float | None], reduction: int) -> list[int]:
    """Numbers of the trials that go on: the best 1/reduction, one at least; None stands for a failure."""
    found = {number: value for number, value in separations.items() if value is not None}
    ranked = sorted(found, key=lambda number: (-found[number], number))
    return sorted(ranked[: math.ceil(len(separations) / reduction)])

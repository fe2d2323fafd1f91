"""Models that a command names: one of the workspace by its id, or a folder from elsewhere, to be brought in.

A folder is copied into the workspace, because every machine of a cluster must be able to read it, and gets
its weights' hash for an id: brought in twice it is one model. Settings then name the id alone, so that they
mean the same to everyone who opens the workspace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rayscan import planning
from rayscan.config import ModelConfig, RunConfig
from rayscan.errors import ConfigError, ModelError
from rayscan.planning import Model
from rayscan.progress import say
from rayscan.tables import Workspace

_FILES = ("model.safetensors", "card.json", "README.md", "config.json")  # the last makes it whole


@dataclass(frozen=True)
class Named:
    """A model that somebody named. `folder` is None where it lies in the workspace already."""

    model: Model
    settings: dict[str, Any]
    folder: str | None


def named(workspace: Workspace, reference: str) -> Named:
    """The model behind an id of the workspace, or a folder or s3:// prefix. Reads, writes nothing.

    Raises ConfigError where there is no such thing, ModelError if it is no whole model.
    """
    inside = reference.rstrip("/").removeprefix(f"{workspace.uri}/models/")
    if "/" not in inside:
        facts = _facts(workspace, f"models/{inside}/config.json")
        if facts is not None:
            card = workspace.read_json(f"models/{inside}/card.json") or {}
            model = Model(inside, facts["weights"], card, facts["method"])
            return Named(model, facts["model"], None)
    outside = _place(reference)
    facts = _facts(outside, "config.json")
    if facts is None:
        raise ConfigError(
            f"{reference} is neither a model of {workspace.uri} nor a folder with one (it has no config.json)"
        )
    name = facts["weights"][:16]
    model = Model(name, facts["weights"], _card(outside, reference), facts["method"])
    is_here = workspace.read_json(f"models/{name}/config.json") is not None
    return Named(model, facts["model"], None if is_here else reference)


def bring_in(workspace: Workspace, found: Named) -> None:
    """Check a named model and copy it into the workspace, if it is not there. Raises ModelError."""
    if found.folder is None:
        return
    from rayscan.methods import artefact as methods
    from rayscan.model import artefact  # torch, which naming a model does without

    outside = _place(found.folder)
    load = artefact.load if found.model.method == planning.ENCODER else methods.load
    try:
        load(outside.read_bytes)
    except ModelError as error:
        raise ModelError(f"{found.folder}: {error}") from None
    for name in _FILES:
        workspace.write_bytes(f"{found.model.folder}/{name}", outside.read_bytes(name))
    say(f"model {found.model.id}: copied from {found.folder}")


def using(config: RunConfig, found: Named) -> RunConfig:
    """The settings, with this model in place of one to train."""
    return config.model_copy(update={"embed": config.embed.model_copy(update={"model": found.model.id})})


def starting_from(config: RunConfig, found: Named) -> RunConfig:
    """The settings, with training that goes on from this model; its architecture comes along."""
    if found.model.method != planning.ENCODER:
        raise ModelError(
            f"{found.model.id} is of the method {found.model.method}; training goes on from encoders alone"
        )
    try:
        model = ModelConfig.model_validate(found.settings)
    except ValidationError as error:
        raise ModelError(
            f"{found.folder or found.model.id}: cannot build this model: {error.errors()[0]['msg']}"
        ) from None
    if model != config.model.settled(model.inputs.__contains__):
        say("train: the settings of section `model` are those of the model to go on from")
    train = config.train.model_copy(update={"start": found.model.id})
    return config.model_copy(update={"model": model, "train": train})


def check_start(workspace: Workspace, config: RunConfig) -> None:
    """Raise ModelError if the model to go on from is not there or of another architecture than asked for."""
    if config.train.start is None:
        return
    place = workspace.url(f"models/{config.train.start}")
    facts = _facts(workspace, f"models/{config.train.start}/config.json")
    if facts is None:
        raise ModelError(f"train.start: there is no model {place}; `train --from` brings one in")
    if facts["method"] != planning.ENCODER:
        raise ModelError(f"train.start: {place} is of the method {facts['method']}, not an encoder")
    asked = config.model.model_dump(mode="json")
    other = [
        f"{name} {value}, not {asked.get(name)}"
        for name, value in facts["model"].items()
        if value != asked.get(name)
    ]
    if other:
        raise ModelError(
            f"{place} is of another architecture than section `model` asks for: {'; '.join(other)}. "
            "`train --from` takes the model's own"
        )


def _place(reference: str) -> Workspace:
    """Files are read the same way inside a workspace and outside."""
    return Workspace.at(reference)


def _facts(place: Workspace, path: str) -> dict[str, Any] | None:
    """A model's config.json, or None where there is none."""
    try:
        facts = place.read_json(path)
        if facts is None:
            return None
        if not re.fullmatch("[0-9a-f]{32}", facts["weights"]):  # it becomes the name of a folder
            raise ValueError("weights is not a hash")
        method = planning.method_of(facts)
        settings = dict(facts["model"]) if method == planning.ENCODER else {}
        return {"weights": facts["weights"], "model": settings, "method": method}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place.url(path)} is damaged ({error}); copy the folder again") from None


def _card(place: Workspace, name: str) -> dict[str, Any]:
    try:
        return place.read_json("card.json") or {}
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name}/card.json is damaged ({error}); copy the folder again") from None

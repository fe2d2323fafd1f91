"""What a method of others has learnt, as a folder: the same files as those of an encoder (`model.artefact`).

model.safetensors   arrays
config.json         versions, the method with its facts, digest of the arrays
card.json           what it learnt from, for programs
README.md           the same for people
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from rayscan import __version__
from rayscan.errors import ModelError
from rayscan.methods.method import Fitted, method
from rayscan.model.artefact import CONFIG, WEIGHTS, Card, Read, Write, read_folder, write_folder


def save(write: Write, fitted: Fitted, card: Card) -> None:
    """Write the folder, one call of `write(name, data)` for each file; config.json comes last."""
    arrays = {name: np.ascontiguousarray(values) for name, values in fitted.arrays.items()}
    write_folder(write, save_arrays(arrays), {"method": fitted.facts}, card, _readme(fitted.facts, card))


def load(read: Read) -> tuple[Fitted, Card]:
    """The method and its card. Raises ModelError like `model.artefact.load`, and for what is no method;
    ConfigError where packages are missing."""
    config, data, card = read_folder(read)
    facts = config.get("method")
    if not isinstance(facts, dict) or "name" not in facts:
        raise ModelError(f"{CONFIG} names no method: the model is an encoder, or damaged")
    try:
        return method(facts["name"]).load(load_arrays(data), facts), card
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{WEIGHTS} does not fit the method {facts['name']} in {CONFIG} ({error}); it was written by "
            f"rayscan {config.get('rayscan', '?')}: train again"
        ) from None


def _readme(facts: dict[str, Any], card: Card) -> str:
    lines = [
        f"# {card.name}",
        "",
        f"`{facts['name']}`, a method that rayscan {__version__} has to compare with (docs/methods.md).",
        "It maps a sequence of flows of one source to a unit vector.",
        *(["", str(facts["label"])] if "label" in facts else []),
        "",
        "| | |",
        "|---|---|",
        f"| trained | {card.created} |",
        f"| data | {card.data_from} to {card.data_to} |",
        f"| telescope | {', '.join(card.prefixes) or 'unknown'} |",
        f"| sensors | {', '.join(card.sensors) or 'unknown'} |",
        f"| sequence | {card.min_length} to {card.sequence_length} flows |",
        "",
        "## What it is made with",
        "",
        "```json",
        json.dumps(facts, indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)

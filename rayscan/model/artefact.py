"""A trained encoder as a folder that outlives the program: weights, configuration, model card.

    model.safetensors   weights
    config.json         version of this format, of rayscan, ModelConfig, digest of the weights
    card.json           what the model was trained on and what it reached, for programs
    README.md           the same for people

Nothing here knows where the folder lies: the caller passes a function that writes or reads one file of
it. No pickle, so that loading somebody's model cannot run their code.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from rayscan import __version__
from rayscan.config import ModelConfig
from rayscan.errors import ModelError
from rayscan.model.encoder import Encoder

VERSION = 1
"""Of the folder's layout; raised when an older rayscan could not read it."""

WEIGHTS, CONFIG, CARD, README = "model.safetensors", "config.json", "card.json", "README.md"

Write = Callable[[str, bytes], None]
Read = Callable[[str], bytes]


class Card(BaseModel):
    """What one should know of a model before trusting its vectors."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer rayscan may say more

    name: str = Field("", description="Name of the model in its workspace.")
    created: str = Field("", description="When it was trained, ISO 8601 UTC.")
    data_from: str = Field("", description="First flow of the training data, ISO 8601 UTC.")
    data_to: str = Field("", description="Last flow of the training data, ISO 8601 UTC.")
    prefixes: tuple[str, ...] = Field((), description="Destination prefixes of the telescope.")
    sensors: tuple[str, ...] = Field((), description="Telescopes or vantage points.")
    sequence_length: int = Field(0, description="Flows in a full sequence.")
    min_length: int = Field(0, description="Flows in the shortest sequence.")
    training: dict[str, Any] = Field({}, description="Settings of training.")
    metrics: dict[str, float] = Field({}, description="What it reached, by name.")
    limits: tuple[str, ...] = Field((), description="Further limits, one sentence each.")


def save(write: Write, encoder: Encoder, card: Card) -> None:
    """Write the folder, one call of `write(name, data)` for each file; config.json comes last."""
    weights = save_tensors({k: x.detach().cpu().contiguous() for k, x in encoder.state_dict().items()})
    about = {"model": encoder.config.model_dump(mode="json")}
    write_folder(write, weights, about, card, readme(encoder, card))


def write_folder(write: Write, weights: bytes, about: dict[str, Any], card: Card, text: str) -> None:
    """The files of any model: safetensors, what it is `about`, its card and that card as a page."""
    config = {"version": VERSION, "rayscan": __version__, **about, "weights": _hash(weights)}
    write(WEIGHTS, weights)
    write(CARD, _json(card.model_dump(mode="json")))
    write(README, text.encode())
    write(CONFIG, _json(config))  # a folder with it is whole


def load(read: Read) -> tuple[Encoder, Card]:
    """The encoder, on the CPU and set to inference, and its card.

    `read(name)` gives a file's bytes or raises FileNotFoundError. Raises ModelError if a file is absent or
    damaged, if the model is of a newer version, or if weights and configuration do not belong together.
    """
    config, data, card = read_folder(read)
    try:
        model = ModelConfig.model_validate(config.get("model"))
    except ValidationError as error:
        raise ModelError(
            f"{CONFIG}: this rayscan cannot build the model ({error.error_count()} settings are wrong, "
            f"first: {error.errors()[0]['msg']}); load it with rayscan {config.get('rayscan', '?')}"
        ) from None
    return _encoder(model, data), card


def read_folder(read: Read) -> tuple[dict[str, Any], bytes, Card]:
    """What config.json says, the safetensors that belong to it, and the card. Raises ModelError as `load`."""
    config = _object(read, CONFIG)
    version = config.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ModelError(
            f"{CONFIG}: the model is of format {version}, written by rayscan {config.get('rayscan', '?')}; "
            f"this is rayscan {__version__}, which reads up to {VERSION}: upgrade rayscan"
        )
    data = _bytes(read, WEIGHTS)
    if _hash(data) != config.get("weights"):
        raise ModelError(f"{WEIGHTS} is damaged or of another model than {CONFIG}; copy the folder again")
    return config, data, _card(read)


def readme(encoder: Encoder, card: Card) -> str:
    """The model card, Markdown."""
    config = encoder.config
    parameters = sum(p.numel() for p in encoder.parameters())
    lines = [
        f"# {card.name or 'rayscan encoder'}",
        "",
        "Maps a sequence of flows of one source, as a network telescope records them, to a unit vector.",
        f"Sources that behave alike get vectors with a high cosine. Made with rayscan {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| trained | {card.created or 'unknown'} |",
        f"| data | {card.data_from or 'unknown'} to {card.data_to or 'unknown'} |",
        f"| telescope | {', '.join(card.prefixes) or 'unknown'} |",
        f"| sensors | {', '.join(card.sensors) or 'unknown'} |",
        f"| inputs, per flow | {', '.join(config.inputs)} |",
        f"| sequence | {card.min_length or '?'} to {card.sequence_length or '?'} flows |",
        f"| vector | {config.d_embedding} dimensions |",
        f"| encoder | {config.layers} layers of width {config.d_model}, {parameters:,} parameters |",
        "",
        "## What it reached",
        "",
        *([f"- {name}: {value:.4g}" for name, value in sorted(card.metrics.items())] or ["Not measured."]),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in (*_inherent_limits(config), *card.limits)),
        "",
        "## Settings of training",
        "",
        *([f"- {name}: {value}" for name, value in sorted(card.training.items())] or ["Not recorded."]),
        "",
    ]
    return "\n".join(lines)


def covering_prefixes(networks: NDArray[np.integer], most: int = 16) -> tuple[str, ...]:
    """Prefixes that cover all these /24 networks (addresses without their last octet), at most `most`.

    Exactly them where so few prefixes do; else the prefixes are as long as they can be.
    """
    for length in range(24, -1, -1):
        found = np.unique(networks.astype(np.int64) >> (24 - length))
        if length < 24 and len(found) > 256 * most:
            continue  # halving their number takes many lengths more
        nets = (ipaddress.IPv4Network((int(n) << (32 - length), length)) for n in found)
        prefixes = list(ipaddress.collapse_addresses(nets))
        if len(prefixes) <= most:
            return tuple(map(str, prefixes))
    return ()


def _inherent_limits(config: ModelConfig) -> list[str]:
    limits = [
        "Flows must record every input above; the model refuses others.",
        "Scanning changes over the years: vectors of traffic far from the training window are worth less.",
        "A vector says how a source behaves, not who it is.",
    ]
    if "dst" in config.inputs:
        limits.append(
            "Destination addresses are inputs: the model knows its own telescope's prefix and should be "
            "trained anew for another."
        )
    if config.time == "float32":
        limits.append(
            "Gaps are taken from times rounded to float32: those under two minutes are mostly lost."
        )
    return limits


def _encoder(model: ModelConfig, data: bytes) -> Encoder:
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{WEIGHTS} is damaged ({error}); copy the folder again") from None
    encoder = Encoder(model)
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(
            f"{WEIGHTS} does not fit the architecture in {CONFIG} ({_first_lines(error)}); it was written by "
            "another version of rayscan, or edited: train again"
        ) from None
    if not all(bool(torch.isfinite(x).all()) for x in tensors.values()):
        raise ModelError(f"{WEIGHTS} has weights that are not finite; train again")
    return encoder.eval()


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)


def _card(read: Read) -> Card:
    try:
        return Card.model_validate(_object(read, CARD))
    except ValidationError as error:
        raise ModelError(f"{CARD} is damaged ({error.error_count()} fields); copy the folder again") from None


def _object(read: Read, name: str) -> dict[str, Any]:
    try:
        data = json.loads(_bytes(read, name))
    except ValueError as error:
        raise ModelError(f"{name} is damaged ({error}); copy the folder again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{name} is damaged (no JSON object); copy the folder again")
    return data


def _bytes(read: Read, name: str) -> bytes:
    try:
        return read(name)
    except FileNotFoundError:
        raise ModelError(
            f"no {name} there: not a model, or one not wholly written; train one first"
        ) from None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

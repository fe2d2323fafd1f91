"""Folders of methods: what they hold, and that what is no whole one is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tables_of_sequences import bits, sequences_of

from rayscan.config import ModelConfig
from rayscan.errors import ModelError
from rayscan.methods import artefact, ports
from rayscan.model import artefact as encoders
from rayscan.model.artefact import Card
from rayscan.model.encoder import Encoder

TABLE = sequences_of([[{"port": port} for port in (k, k + 1, 80)] for k in range(6)])
CARD = Card(name="m", created="2026-01-01", sequence_length=16, min_length=3)


@pytest.fixture
def files() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    fitted = ports.fit("ports-svd", TABLE, np.zeros(6, np.int8), 0)
    artefact.save(found.__setitem__, fitted, CARD)
    assert list(found)[-1] == "config.json"  # with it the folder is whole
    return found


def test_what_is_loaded_embeds_alike(files: dict[str, bytes]) -> None:
    fitted, card = artefact.load(files.__getitem__)
    again = ports.fit("ports-svd", TABLE, np.zeros(6, np.int8), 0)
    assert bits(fitted.embed(TABLE)) == bits(again.embed(TABLE)) and card == CARD
    assert fitted.facts == json.loads(files["config.json"])["method"]
    assert "`ports-svd`" in files["README.md"].decode()


def test_what_does_not_belong_together_is_refused(files: dict[str, bytes]) -> None:
    damaged = files | {"model.safetensors": files["model.safetensors"][:-1]}
    with pytest.raises(ModelError, match="damaged or of another model"):
        artefact.load(damaged.__getitem__)
    config = json.loads(files["config.json"])
    config["method"]["name"] = "clan"
    other = files | {"config.json": json.dumps(config).encode()}
    with pytest.raises(ModelError, match="does not fit the method clan"):
        artefact.load(other.__getitem__)


def test_encoders_and_methods_are_told_apart(files: dict[str, bytes]) -> None:
    encoder: dict[str, bytes] = {}
    model = ModelConfig(d_model=8, heads=1, layers=1, d_ff=8, d_embedding=4, counts=4)
    encoders.save(encoder.__setitem__, Encoder(model), CARD)
    with pytest.raises(ModelError, match="names no method"):
        artefact.load(encoder.__getitem__)
    with pytest.raises(ModelError, match="cannot build the model"):
        encoders.load(files.__getitem__)

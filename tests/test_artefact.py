"""A model folder: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import ipaddress
import json
import pickletools

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from rayscan import __version__
from rayscan.config import ModelConfig
from rayscan.errors import ModelError
from rayscan.model import artefact
from rayscan.model.artefact import Card, covering_prefixes, load, save
from rayscan.model.encoder import Encoder

CONFIG = ModelConfig(inputs=("dst", "gap", "ttl"), d_model=16, layers=1, heads=2, d_ff=16, d_embedding=8)
CARD = Card(
    name="main",
    data_from="2024-03-01T00:00:00Z",
    data_to="2024-03-31T23:59:59Z",
    prefixes=("198.51.100.0/24",),
    sequence_length=128,
    min_length=16,
    metrics={"separation, unseen sources": 0.97},
    limits=("Trained on TCP only.",),
)


@pytest.fixture
def folder() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    torch.manual_seed(0)
    save(files.__setitem__, Encoder(CONFIG), CARD)
    return files


def read(files: dict[str, bytes]):
    def one(name: str) -> bytes:
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    return one


def change_config(files: dict[str, bytes], **changes: object) -> None:
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()


def test_round_trip(folder):
    torch.manual_seed(0)
    original = Encoder(CONFIG)
    encoder, card = load(read(folder))
    assert card == CARD
    assert encoder.config == CONFIG
    assert not encoder.training
    for name, x in original.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], x)


def test_whole_only_when_config_is_there(folder):
    assert list(folder) == ["model.safetensors", "card.json", "README.md", "config.json"]
    assert json.loads(folder["config.json"])["rayscan"] == __version__


def test_no_pickle(folder):
    for data in folder.values():
        with pytest.raises(Exception):  # noqa: B017 (pickletools raises several kinds)
            list(pickletools.genops(data))


def test_card_for_people_names_data_inputs_metrics_and_limits(folder):
    text = folder["README.md"].decode()
    for words in (
        "198.51.100.0/24",
        "2024-03-01",
        "dst, gap, ttl",
        "0.97",
        "Trained on TCP only.",
        "16 to 128 flows",
    ):
        assert words in text
    plain = artefact.readme(Encoder(CONFIG), Card())
    assert "unknown" in plain
    assert "Not measured." in plain


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "card.json"])
def test_absent_file(folder, name):
    del folder[name]
    with pytest.raises(ModelError, match=rf"{name}.*train one first"):
        load(read(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "card.json"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"[1]"])
def test_damaged_file(folder, name, damage):
    folder[name] = damage(folder[name])
    with pytest.raises(ModelError, match=rf"{name} is damaged"):
        load(read(folder))


def test_one_flipped_bit_of_the_weights(folder):
    data = bytearray(folder["model.safetensors"])
    data[-3] ^= 1
    folder["model.safetensors"] = bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        load(read(folder))


def replace_weights(folder: dict[str, bytes], tensors: dict[str, torch.Tensor]) -> None:
    folder["model.safetensors"] = save_tensors(tensors)
    change_config(folder, weights=artefact._hash(folder["model.safetensors"]))


def test_weights_of_another_architecture(folder):
    other = Encoder(CONFIG.model_copy(update={"d_ff": 24}))
    replace_weights(folder, dict(other.state_dict()))
    with pytest.raises(ModelError, match=r"does not fit.*size mismatch"):
        load(read(folder))
    replace_weights(folder, {"x": torch.ones(2)})
    with pytest.raises(ModelError, match="does not fit"):
        load(read(folder))


def test_weights_that_are_not_finite(folder):
    tensors = dict(Encoder(CONFIG).state_dict())
    tensors["tokens.mix.bias"] = tensors["tokens.mix.bias"] * float("nan")
    replace_weights(folder, tensors)
    with pytest.raises(ModelError, match="not finite"):
        load(read(folder))


@pytest.mark.parametrize("version", [2, None, "1"])
def test_newer_or_unknown_version(folder, version):
    change_config(folder, version=version, rayscan="9.0.0")
    with pytest.raises(ModelError, match=r"9\.0\.0.*upgrade rayscan"):
        load(read(folder))


@pytest.mark.parametrize("model", [None, {"d_model": 16, "novelty": 1}, {"d_model": "wide"}])
def test_config_this_version_cannot_build(folder, model):
    change_config(folder, model=model)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(read(folder))


def test_card_of_a_newer_version_may_say_more(folder):
    folder["card.json"] = json.dumps(json.loads(folder["card.json"]) | {"novelty": 1}).encode()
    assert load(read(folder))[1] == CARD


def network(text: str) -> int:
    return int(ipaddress.IPv4Address(text)) >> 8


def test_covering_prefixes():
    whole = np.arange(network("198.18.0.0"), network("198.20.0.0"))
    assert covering_prefixes(whole) == ("198.18.0.0/15",)
    some = np.array([network(a) for a in ("10.0.0.0", "10.0.1.0", "10.0.3.0")])
    assert covering_prefixes(some) == ("10.0.0.0/23", "10.0.3.0/24")
    assert covering_prefixes(some, most=1) == ("10.0.0.0/22",)
    assert covering_prefixes(np.zeros(0, np.int64)) == ()


@pytest.mark.parametrize("most", [1, 4, 16])
def test_covering_prefixes_cover_everything_and_are_few(most):
    networks = np.random.default_rng(0).integers(0, 2**24, 3000)
    prefixes = [ipaddress.IPv4Network(p) for p in covering_prefixes(networks, most)]
    assert 1 <= len(prefixes) <= most
    for n in networks[:300]:
        assert sum(ipaddress.IPv4Address(int(n) << 8) in p for p in prefixes) == 1

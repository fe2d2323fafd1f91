"""Counted features: what is counted, and that counting is all that happens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayscan.model.counts import Counts, features, hashed
from rayscan.model.encoder import Service, Waves
from rayscan.model.features import GAP_CENTRE, GAP_SPREAD

INPUTS = ("dst", "dst_port", "proto", "gap")


def gap(*seconds: float) -> torch.Tensor:
    scaled = (np.log1p(np.array([seconds]) * 1e3) - GAP_CENTRE) / GAP_SPREAD
    return torch.from_numpy(scaled.astype(np.float32))


def flows() -> dict[str, torch.Tensor]:
    """One sequence: twice SSH at .1, HTTP at .2, ping at .5."""
    return {
        "dst": torch.tensor([[1, 1, 2, 5]]),
        "dst_port": torch.tensor([[22, 22, 80, 8]]),
        "proto": torch.tensor([[6, 6, 6, 1]]),
        "gap": gap(0, 0, 1, 3600),
        "mask": torch.ones(1, 4, dtype=torch.bool),
    }


def test_features_by_hand():
    found = {name: x[0].tolist() for name, x in features(flows(), INPUTS).items()}
    assert found["dst"] == [1, 1, 2, 5]
    assert found["service"] == [22 * 256 + 6, 22 * 256 + 6, 80 * 256 + 6, 8 * 256 + 1]
    assert found["step"] == [0, 0, 1, 3]
    assert found["page"] == [0, 0, 0, 0]
    # log2(1 + milliseconds) is 0, 9.97 and 21.78; the first flow has no gap, which is not a gap of 0.
    assert found["coarse gap"] == [-1, 0, 9, 21]
    assert found["gap"] == [-1, 0, 19, 43]
    assert found["fine gap"] == [-1, 0, 39, 87]
    for name in ("next service", "direction", "next gap", "gap of service", "gap of dst", "dst of service"):
        assert name in found
    assert found["next service"][0] == found["next service"][1] != found["next service"][2]
    assert len(set(found["direction"])) == 3  # same again, both up, port down and host up


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 7, 15])
def test_edges_of_gaps_do_not_hang_on_rounding(milliseconds):
    batch = flows() | {"gap": gap(0, *[milliseconds / 1e3] * 3)}
    expected = int(np.log2(1 + milliseconds))
    assert features(batch, INPUTS)["coarse gap"][0, 1:].tolist() == [expected] * 3


@pytest.mark.parametrize("inputs", [("dst",), ("dst_port",), ("proto",), ("gap",), ("dst_port", "ttl")])
def test_only_the_inputs_are_looked_at(inputs):
    batch = {name: x for name, x in (flows() | {"ttl": torch.full((1, 4), 64)}).items() if name in inputs}
    found = features(batch, inputs)
    assert found
    assert ("service" in found) == ("dst_port" in inputs)
    assert ("ttl of service" in found) == ("ttl" in inputs)


def test_what_is_added_up():
    """Values by the root of how often they occur; what is of the whole sequence by half the root of flows."""
    rows = 4096
    counts = Counts(INPUTS, rows, rows)
    counts.weight.data = torch.eye(rows)
    values_FL = torch.stack([x[0] for x in features(flows(), INPUTS).values()])
    expected = np.zeros(rows)
    for row_L in hashed(values_FL.unsqueeze(0), rows)[0].tolist():
        for row, times in Counter(row_L).items():
            expected[row] += times**0.5
    different = [int(4 * np.log2(len(set(value_L)))) for value_L in values_FL.tolist()]
    least, median, most, in_all = (np.log2(1 + ms) for ms in (0, 1e3, 3.6e6, 3.601e6))
    found = [least, least, median, most, most, in_all]  # quartiles of three gaps, and their sum
    durations = [int(2 * x) for x in found] + [int(x + 0.5) for x in found]
    whole = torch.tensor([[[x] for x in different + durations]])
    np.add.at(expected, hashed(whole, rows, salt=len(different))[0, :, 0].numpy(), 1.0)
    found = counts(flows())[0].detach().numpy()
    np.testing.assert_allclose(found / np.linalg.norm(found), expected / np.linalg.norm(expected), atol=1e-6)
    assert np.linalg.norm(found) == pytest.approx(rows**0.5 / 2)


def test_source_ports_count_where_they_come_again():
    inputs = ("dst_port", "src_port")
    counts = Counts(inputs, 4096, 64)
    torch.nn.init.normal_(counts.weight, generator=torch.Generator().manual_seed(0))

    def vector(*ports: int) -> torch.Tensor:
        return F.normalize(counts(flows() | {"src_port": torch.tensor([ports])}), dim=1)[0]

    assert vector(50_001, 50_002, 50_003, 50_004) @ vector(40_001, 40_002, 40_003, 40_004) > 0.99
    assert vector(6000, 6000, 6000, 6000) @ vector(7000, 7000, 7000, 7000) < 0.9


def test_unseen_values_tell_sequences_apart_before_any_training():
    torch.manual_seed(0)
    counts = Counts(INPUTS, 16_384, 128)
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 2**16, 4) for _ in range(30)]
    ports = np.array([rng.choice(s, 16) for s in sources for _ in range(2)])
    batch = {
        "dst": torch.from_numpy(rng.integers(0, 2**16, ports.shape)),
        "dst_port": torch.from_numpy(ports),
        "proto": torch.full(ports.shape, 6),
        "gap": torch.zeros(ports.shape),
        "mask": torch.ones(ports.shape, dtype=torch.bool),
    }
    with torch.no_grad():
        z = torch.nn.functional.normalize(counts(batch), dim=-1)
    nearest = (z @ z.T - 2 * torch.eye(60)).argmax(dim=1)
    assert (nearest // 2 == torch.arange(60) // 2).float().mean() > 0.9


def test_rows_are_spread_and_depend_on_the_feature():
    values = torch.arange(4096).repeat(2, 1).unsqueeze(0)
    row = hashed(values, 4096)[0]
    assert row.min() >= 0 and row.max() < 4096
    used = len(row[0].unique()) / 4096
    assert used == pytest.approx(1 - np.exp(-1), abs=0.03)  # as balls thrown into boxes
    assert (row[0] == row[1]).float().mean() < 0.01


def test_services_hash_the_protocol_and_missing_ports_are_nothing():
    service = Service()
    tcp, icmp, missing = 8 * 256 + 6, 8 * 256 + 1, -256 + 6
    out = service(torch.tensor([[tcp, icmp, missing]]))[0]
    assert (out[0] - out[1]).abs().max() > 0.1
    assert out[2].abs().max() == 0


def test_waves_tell_close_gaps_apart_and_stay_bounded():
    a, b, week = Waves()(gap(60, 64, 7 * 86_400))[0]
    assert (a - b).norm() > 0.5
    assert week.abs().max() < 4

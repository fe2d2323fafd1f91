from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tables_of_sequences import sequences_of

from rayscan.errors import DataError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SOURCES
from rayscan.methods import clan
from rayscan.methods.method import flows_of
from rayscan.methods.statistics import CommonServices, window_statistics
from rayscan.schema import SEQUENCES

SMALL = clan.Settings(width=32, d_out=8, batch=64, steps=60, peak_rate=3e-3, services=4)


def test_the_loss_by_hand():
    # Unit vectors at 0 and 90 degrees; copies at 0 and 180 degrees.
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    corrupted = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    # d(z_i, z_j) is 0, 1/2, 1/2, 0: mean of those that are not zero 1/2.
    # m - d(z_i, z'_j) is 1/2 - (0, 1, 1/2, 1/2): one of them is positive, so the mean is 1/2.
    settings = replace(SMALL, margin=0.5, alpha=0.25)
    assert clan.loss(z, corrupted, settings).item() == pytest.approx(0.25 * 0.5 + 0.75 * 0.5)


def test_the_encoder_by_hand():
    encoder = clan.Encoder(2, replace(SMALL, width=2, blocks=2, d_out=1))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        encoder.skip.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        encoder.layers[1].weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        encoder.project.weight.copy_(torch.tensor([[1.0, 10.0]]))
    # First block: ReLU(3, -4) + (4, 3) = (7, 3); second: ReLU(3, -7) + (7, 3) = (10, 3).
    assert encoder(torch.tensor([[3.0, 4.0]])).item() == 10 + 10 * 3


def test_what_differs_from_training_scores_higher():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((3, 12))
    usual = rng.standard_normal((600, 3)) @ mixing
    other = rng.standard_normal((200, 12)) * usual.std(0)  # same deviations, none of the correlations
    scaling = clan.Scaling.learn(usual[:400])
    encoder = clan.pretrain(scaling(usual[:400]), SMALL, seed=0)
    centre = clan.project(encoder, scaling(usual[:400])).mean(0)
    rows = scaling(np.concatenate([usual[400:], other]))
    scores = clan.anomaly_scores(clan.project(encoder, rows), centre)
    untrained = clan.pretrain(scaling(usual[:400]), replace(SMALL, steps=0), seed=0)
    blank = clan.anomaly_scores(
        clan.project(untrained, rows), clan.project(untrained, scaling(usual[:400])).mean(0)
    )
    truth = np.arange(400) >= 200
    assert roc_auc_score(truth, scores) > max(0.85, roc_auc_score(truth, blank) + 0.1)


def test_scaling_survives_constants_and_gaps():
    rows = np.array([[1.0, np.nan, 5.0], [3.0, np.nan, 5.0]])
    scaled = clan.Scaling.learn(rows)(rows)
    np.testing.assert_allclose(scaled, [[-np.sqrt(0.5), 0, 0], [np.sqrt(0.5), 0, 0]], rtol=1e-6)


def _two_kinds(n: int):
    walk = [{"dst": 10 + k, "port": 23, "gap": 1_000_000} for k in range(8)]
    knock = [{"dst": 99, "port": port, "gap": 1000} for port in (80, 443, 80, 8080, 80, 443, 80, 80)]
    return sequences_of([walk if k % 2 else knock for k in range(n)])


def test_saved_and_loaded_it_embeds_alike():
    table = _two_kinds(40)
    part = np.where(np.arange(40) < 30, TRAIN, UNSEEN_SOURCES).astype(np.int8)
    fitted = clan.fit_with(table, part, 0, SMALL)
    again = clan.load(fitted.arrays, fitted.facts)
    found = fitted.embed(table)
    np.testing.assert_array_equal(found.vectors, again.embed(table).vectors)
    np.testing.assert_array_equal(found.vectors, clan.fit_with(table, part, 0, SMALL).embed(table).vectors)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    assert found.covered.all() and not found.inferred.any()
    similarity = found.vectors @ found.vectors.T
    assert similarity[30, 32] > similarity[30, 31]


def test_training_needs_two_sequences():
    with pytest.raises(DataError, match="two training sequences"):
        clan.fit_with(_two_kinds(3), np.array([TRAIN, 3, 3], np.int8), 0, SMALL)


def test_statistics_by_hand():
    table = sequences_of(
        [
            [
                {"dst": 5, "port": 80, "gap": 0},
                {"dst": 6, "port": 80, "gap": 1_000_000},
                {"dst": 6, "port": 53, "gap": 3_000_000, "proto": 17},
                {"dst": 9, "port": 50_000, "gap": 0},
            ]
        ]
    )
    names, values = window_statistics(table)
    found = dict(zip(names, values[0], strict=True))
    assert found["flows"] == pytest.approx(np.log1p(4))
    assert found["distinct destinations"] == 3 / 4
    assert found["destination entropy"] == pytest.approx(1.5)
    assert found["share of tcp"] == 3 / 4 and found["share of udp"] == 1 / 4
    assert found["share of repeated destinations"] == pytest.approx(1 / 3)
    assert found["share of next destinations"] == pytest.approx(1 / 3)
    assert found["share of system ports"] == 3 / 4 and found["share of ephemeral ports"] == 1 / 4
    assert found["log duration"] == pytest.approx(np.log1p(4000))
    assert found["largest log gap"] == pytest.approx(np.log1p(3000)) and found["least log gap"] == 0
    assert np.isnan(found["mean ttl"]) and np.isnan(found["share of syn"])


def test_flows_keep_the_destinations_that_are_recorded():
    table = sequences_of([[{"dst": 7}, {"dst": 8}], [{}, {}], [{"dst": 9}]])
    lists = table["dst"].to_pylist()
    lists[1] = None
    table = table.set_column(table.column_names.index("dst"), table.field("dst"), [lists])
    assert flows_of(table).dst.tolist() == [7, 8, -1, -1, 9]


def test_no_sequences_have_no_statistics():
    names, values = window_statistics(SEQUENCES.empty_table())
    assert values.shape == (0, len(names)) and len(names) == 32


def test_common_services_and_the_rest():
    table = sequences_of(
        [
            [{"port": 80}, {"port": 80}, {"port": 22}, {"port": 7}],
            [{"port": 80}, {"port": 22}],
            [{"port": 9}, {"port": 9}],
        ]
    )
    common = CommonServices.learn(table, 2)
    assert common.services.tolist() == [(6 << 32) + 22, (6 << 32) + 80]
    np.testing.assert_allclose(common.shares(table), [[0.25, 0.5, 0.25], [0.5, 0.5, 0], [0, 0, 1]])


def test_flows_keep_their_times():
    table = sequences_of([[{"gap": 0}, {"gap": 5}], [{"gap": 0}, {"gap": 7}, {"gap": 2}]])
    flows = flows_of(table)
    start = table["start"].cast("int64").to_numpy()
    assert flows.row.tolist() == [0, 0, 1, 1, 1]
    assert (flows.ts - start[flows.row]).tolist() == [0, 5, 0, 7, 9]
    assert flows_of(table.slice(1)).row.tolist() == [0, 0, 0]
    assert len(flows_of(SEQUENCES.empty_table()).ts) == 0

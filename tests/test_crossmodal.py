from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tables_of_sequences import sequences_of

from rayscan.errors import DataError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SOURCES
from rayscan.methods import crossmodal
from rayscan.methods.crossmodal import FIELDS, FLOWS, SIDE, TOKENS, Recorded, Vectors, Windows
from rayscan.schema import SEQUENCES

SMALL = crossmodal.Settings(
    patch=10, width=16, heads=2, blocks=1, crossings=1, d_out=16, batch=24, steps=25, peak_rate=1e-2
)


def _windows(*flows: dict[str, int]) -> Windows:
    """One window; what a flow does not name is not recorded."""
    values = np.full((1, FLOWS, len(FIELDS)), -1)
    for place, flow in enumerate(flows):
        for name, value in flow.items():
            values[0, place, FIELDS.index(name)] = value
    return Windows(values, (np.arange(FLOWS) < len(flows))[None])


def _table(n: int, seed: int = 0) -> pa.Table:
    """Sequences that differ in pace, ports and targets, each in its own way."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        ports = 2 ** rng.choice(16, 3)
        pace = 10 ** rng.uniform(2, 9)
        rows.append(
            [
                {
                    "dst": int(rng.integers(2**32)),
                    "port": int(rng.choice(ports)),
                    "gap": int(pace * rng.uniform(0.8, 1.2)) if place else 0,
                    "proto": 17 if k % 2 else 6,
                }
                for place in range(rng.integers(8, 40))
            ]
        )
    return sequences_of(rows)


# ---------------------------------------------------------------------------------------------
# views
# ---------------------------------------------------------------------------------------------


def test_the_cell_of_a_flow_by_hand():
    first = {"dst": 0x01020304, "dst_port": 0x1F90, "proto": 6, "tcp_flags": 0x102, "ttl": 64, "gap_us": 0}
    second = {"dst_port": 23, "gap_us": 1023, "size": 2**24 + 5}
    windows = _windows(first, second, first)
    pixels = crossmodal.image(windows, windows.real)
    assert pixels.shape == (1, 2, SIDE, SIDE) and pixels.dtype == np.float32
    bytes_, recorded = (pixels[0, channel].ravel() for channel in (0, 1))
    cells = np.round(bytes_ * 255).astype(int).reshape(FLOWS, 16)
    #                   dst         port        proto flags ttl gap     packets size
    own = [1, 2, 3, 4, 0x1F, 0x90, 6, 2, 64, 0, 0, 0, 0, 0, 0, 0]
    assert cells[0].tolist() == own
    # 1024 log2(1 + 1023) is 10,240: bytes 40 and 0.
    assert cells[1].tolist() == [0, 0, 0, 0, 0, 23, 0, 0, 0, 40, 0, 0, 0, 255, 255, 255]
    assert not cells[3:].any()
    known = recorded.reshape(FLOWS, 16)
    assert known[0].tolist() == [1] * 11 + [0] * 5
    assert known[1].tolist() == [0] * 4 + [1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert not known[3:].any()
    # Cells go on in the next row of pixels: the third is split after 8 of its 16 bytes.
    rows = np.round(pixels[0, 0] * 255).astype(int)
    assert rows[0, 32:].tolist() == own[:8] and rows[1, :8].tolist() == own[8:]


def test_hidden_cells_are_blank_in_both_channels():
    windows = _windows({"dst": 1, "gap_us": 5}, {"dst": 2, "gap_us": 5})
    shown = windows.real.copy()
    shown[0, 0] = False
    cells = crossmodal.image(windows, shown).reshape(2, FLOWS, 16)
    assert not cells[:, 0].any() and cells[:, 1].any(1).all()


def test_the_features_of_a_flow_by_hand():
    flow = {"dst_port": 443, "gap_us": 3000, "size": 59, "ttl": 51, "tcp_flags": 2 + 16}
    found = crossmodal.tokens(_windows(flow, {"gap_us": 0}))
    assert found.shape == (1, TOKENS, 3 + 6 + crossmodal.PORT_BUCKETS)
    assert found[0, 0, :3] == pytest.approx([np.log(60), np.log(4), 0.2])
    assert found[0, 0, 3:9].tolist() == [0, 1, 0, 0, 1, 0]
    assert np.flatnonzero(found[0, 0, 9:]).tolist() == [9]  # 256 to 511
    assert np.isnan(np.delete(found[0, 1], 1)).all() and found[0, 1, 1] == 0


def test_the_summary_by_hand():
    flows = [{"gap_us": 0, "size": 40}, {"gap_us": 1_000_000, "size": 60}, {"gap_us": 3_000_000, "size": 60}]
    count, lasting, flows_s, bytes_s, *rest = crossmodal.summary(_windows(*flows))[0]
    assert [count, lasting] == pytest.approx([np.log(3), np.log1p(4000)])
    assert [flows_s, bytes_s] == pytest.approx([np.log1p(3 / 4.001), np.log1p(160 / 4.001)])
    gaps, sizes = np.log1p([1000, 3000]), np.log1p([40, 60, 60])
    for found, values in ((rest[:4], gaps), (rest[4:], sizes)):
        assert found == pytest.approx([values.mean(), values.std(), values.min(), values.max()])
    alone = crossmodal.summary(_windows({"gap_us": 0}))[0]
    assert alone[:3] == pytest.approx([0, 0, np.log1p(1000)]) and np.isnan(alone[3:]).all()


def test_augmentation_keeps_order_and_time():
    windows = Recorded(_table(30)).windows(np.arange(30))
    still = replace(SMALL, jitter=0.0)
    changed = crossmodal.augment(windows, still, np.random.default_rng(1))
    before, after = windows.real.sum(1), changed.real.sum(1)
    assert (after >= 0.8 * before).all() and (after <= before).all() and (after < before).any()
    assert (changed.values[~changed.real] == -1).all()
    for row in range(30):
        was, now = (w.column("dst")[row, : w.real[row].sum()].tolist() for w in (windows, changed))
        places = [was.index(value) for value in now]
        assert places == sorted(places)
        # The gap covers what was left out.
        time = np.cumsum(windows.column("gap_us")[row])[places]
        assert np.cumsum(changed.column("gap_us")[row, : len(now)]).tolist() == (time - time[0]).tolist()
    stretched = crossmodal.augment(
        windows, replace(still, least_kept=1, jitter=0.1), np.random.default_rng(1)
    )
    ratio = stretched.column("gap_us")[:, 1:8] / windows.column("gap_us")[:, 1:8]
    assert np.log(ratio).std() == pytest.approx(0.1, rel=0.2)


def test_windows_of_lists_that_are_not_recorded():
    table = sequences_of([[{"dst": 3}, {"dst": 4}], [{"dst": 5}]])
    ttl = pa.array([None, [64]], SEQUENCES.field("ttl").type)
    table = table.set_column(SEQUENCES.get_field_index("ttl"), "ttl", ttl)
    windows = Recorded(table).windows(np.array([1, 0]))
    assert windows.column("ttl")[:, :2].tolist() == [[64, -1], [-1, -1]]
    assert windows.column("dst")[:, :3].tolist() == [[5, -1, -1], [3, 4, -1]]
    assert windows.real.sum(1).tolist() == [1, 2]
    short = pa.array([[1], [64]], SEQUENCES.field("ttl").type)
    with pytest.raises(DataError, match="ttl and gap_us differ"):
        Recorded(table.set_column(SEQUENCES.get_field_index("ttl"), "ttl", short))


# ---------------------------------------------------------------------------------------------
# losses and schedules
# ---------------------------------------------------------------------------------------------


def test_losses_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Images ask: logits (2, 2) and (0, 0) at τ = ½; sequences ask: (2, 0) and (2, 0), whose own are 2 and 0.
    asked = np.log(2)
    answered = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
    clip = (asked + answered) / 2
    assert crossmodal.clip_loss(a, b, 0.5).item() == pytest.approx(clip)
    # Fused vectors: both augmentations of a sequence alike, the two sequences at right angles. Of each
    # anchor the positive has logit 2 and the two negatives 0.
    ntx = np.log(1 + 2 * np.exp(-2))
    settings = replace(SMALL, fused=0.25)
    found = crossmodal.loss(Vectors(a, b, a), Vectors(a, a, a), 0.5, settings).item()
    perfect = np.log(1 + np.exp(-2))
    assert found == pytest.approx((clip + perfect) / 2 + 0.25 * ntx)


def test_the_temperature_rises():
    settings = crossmodal.Settings()
    taus = [crossmodal.temperature(step, settings) for step in range(settings.steps)]
    assert taus[0] == settings.tau_first and taus[-1] == pytest.approx(settings.tau_last)
    assert (np.diff(taus) > 0).all()
    fixed = replace(settings, tau_first=0.07, tau_last=0.07)
    assert {crossmodal.temperature(step, fixed) for step in range(300)} == {0.07}


# ---------------------------------------------------------------------------------------------
# the model
# ---------------------------------------------------------------------------------------------


def _found(encoder: crossmodal.Encoder, views: crossmodal.Views) -> float:
    """How often an image finds its own sequence first among 16, or a sequence its image."""
    with torch.inference_mode():
        vectors = encoder(views)
    own = torch.arange(16)
    hits = []
    for a, b in zip(vectors.image.split(16), vectors.sequence.split(16), strict=True):
        hits += [(a @ b.T).argmax(1) == own, (a @ b.T).argmax(0) == own]
    return float(torch.cat(hits).float().mean())


def test_after_training_images_find_their_sequences():
    recorded, other = Recorded(_table(96)), Recorded(_table(64, seed=1))
    rows = np.arange(96)
    scalings = crossmodal.Scalings.learn(recorded, rows)
    unseen = scalings.views(other.windows(np.arange(64)))
    blank = crossmodal.pretrain(recorded, rows, scalings, replace(SMALL, steps=0), seed=0)
    trained = crossmodal.pretrain(recorded, rows, scalings, replace(SMALL, steps=60), seed=0)
    # Chance is 1/16; of 128 questions a share of 0.15 is four deviations above it.
    assert _found(blank, unseen) < 0.13 and _found(trained, unseen) > 0.15


def test_the_fused_vector_depends_on_both_views():
    recorded = Recorded(_table(8))
    rows = np.arange(8)
    scalings = crossmodal.Scalings.learn(recorded, rows)
    encoder = crossmodal.pretrain(recorded, rows, scalings, replace(SMALL, steps=0), seed=0)
    views = scalings.views(recorded.windows(rows))
    other = scalings.views(recorded.windows(rows[::-1].copy()))
    with torch.inference_mode():
        a, b, f = encoder(views)
        a_image, b_image, f_image = encoder(replace(views, pixels=other.pixels))
        a_seq, b_seq, f_seq = encoder(replace(other, pixels=views.pixels))
    assert torch.equal(a, a_seq) and torch.equal(b, b_image)  # before fusion each knows its own view only
    assert not torch.allclose(f, f_image, atol=1e-3) and not torch.allclose(f, f_seq, atol=1e-3)
    assert not torch.allclose(a, a_image, atol=1e-3) and not torch.allclose(b, b_seq, atol=1e-3)


def test_padding_and_neighbours_do_not_matter():
    table = _table(6)
    fitted = crossmodal.fit_with(table, np.full(6, TRAIN, np.int8), 0, replace(SMALL, steps=1))
    together = fitted.embed(table).vectors
    alone = np.concatenate([fitted.embed(table.slice(k, 1)).vectors for k in range(6)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    views = fitted.scalings.views(Recorded(table).windows(np.arange(6)))
    filled = views.tokens + 7.0 * ~views.mask[:, :, None]
    with torch.inference_mode():
        found = fitted.encoder(replace(views, tokens=filled)).fused.numpy()
    np.testing.assert_allclose(found, together, atol=1e-5)


def test_the_source_is_not_seen():
    table = _table(10)
    moved = table.set_column(
        SEQUENCES.get_field_index("src"), SEQUENCES.field("src"), pa.array(np.arange(10) * 7919 + 5)
    )
    part = np.full(10, TRAIN, np.int8)
    settings = replace(SMALL, steps=2)
    np.testing.assert_array_equal(
        crossmodal.fit_with(table, part, 0, settings).embed(table).vectors,
        crossmodal.fit_with(moved, part, 0, settings).embed(moved).vectors,
    )


def test_saved_and_loaded_it_embeds_alike():
    table = _table(30)
    part = np.where(np.arange(30) < 24, TRAIN, UNSEEN_SOURCES).astype(np.int8)
    settings = replace(SMALL, steps=4)
    fitted = crossmodal.fit_with(table, part, 0, settings)
    found = fitted.embed(table)
    again = crossmodal.load(fitted.arrays, fitted.facts)
    np.testing.assert_array_equal(found.vectors, again.embed(table).vectors)
    twin = crossmodal.fit_with(table, part, 0, settings)
    np.testing.assert_array_equal(found.vectors, twin.embed(table).vectors)
    assert not np.allclose(found.vectors, crossmodal.fit_with(table, part, 1, settings).embed(table).vectors)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    assert found.covered.all() and not found.inferred.any()
    assert "abstract-faithful" in fitted.facts["label"]
    assert fitted.embed(table.slice(0, 0)).vectors.shape == (0, SMALL.d_out)


def test_training_needs_two_sequences():
    with pytest.raises(DataError, match="two training sequences"):
        crossmodal.fit_with(_table(3), np.array([TRAIN, 3, 3], np.int8), 0, SMALL)

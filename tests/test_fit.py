"""Training: it learns, it can be killed and resumed, and N processes do what one does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from rayscan.config import ModelConfig, SplitConfig, TrainConfig, digest
from rayscan.errors import DataError, ModelError
from rayscan.model.embed import embed, packed
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences, collate
from rayscan.model.fit import TrainState, auroc, fit, learning_rate, parameter_groups, separation
from rayscan.model.sampling import PairSampler, validation_sample

MODEL = ModelConfig(inputs=("dst_port", "gap"), d_model=16, layers=1, heads=2, d_ff=16, d_embedding=8)
SPLIT = SplitConfig(validation_sources=0.3, test_sources=0)
TRAIN = TrainConfig(
    steps=24, batch_sources=10, warmup_steps=4, validate_every=6, checkpoint_every=7, learning_rate=3e-3,
    precision="float32",
)  # fmt: skip


def telescope(sources: int = 60, per_source: int = 6, seed: int = 0) -> Sequences:
    """Each source has three ports and a pace of its own; sequences have 4 to 12 flows."""
    rng = np.random.default_rng(seed)
    n = sources * per_source
    lengths = rng.integers(4, 13, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    source = np.repeat(np.repeat(np.arange(sources), per_source), lengths)
    ports = rng.integers(0, 40, (sources, 3))[source, rng.integers(0, 3, offsets[-1])]
    gap = (rng.exponential(1.0, offsets[-1]) * np.exp(rng.normal(14, 2, sources))[source]).astype(np.int64)
    gap[offsets[:-1]] = 0
    return Sequences(
        offsets=offsets,
        src=np.repeat(np.arange(sources, dtype=np.int64), per_source),
        index=np.tile(np.arange(per_source, dtype=np.int32), sources),
        sequences=np.full(n, per_source, np.int32),
        sequence_id=np.arange(n),
        start=np.full(n, 1_700_000_000_000_000),
        columns={"dst_port": ports.astype(np.int32), "gap_us": gap},
    )


DATA = telescope()


def load(_: object) -> Sequences:
    return DATA


def sampler(train: TrainConfig = TRAIN, rank: int = 0, world: int = 1) -> PairSampler:
    return PairSampler(["all"], load, SPLIT, train, rank, world)


VALIDATION = validation_sample(["all"], load, SPLIT)


def losses(metrics: list[dict[str, float]]) -> list[float]:
    return [m["loss"] for m in metrics]


def test_learns_to_separate_unseen_sources():
    train = TRAIN.model_copy(update={"steps": 60})
    torch.manual_seed(0)
    before = separation(Encoder(MODEL), VALIDATION, "cpu", "float32")
    result = fit(MODEL, train, sampler(train), validation=VALIDATION)
    assert result.separation > before + 0.05
    assert result.separation == pytest.approx(
        separation(result.encoder, VALIDATION, "cpu", "float32"), abs=1e-6
    )
    assert np.mean(losses(result.metrics)[-5:]) < np.mean(losses(result.metrics)[:5]) - 0.3


def test_metrics_of_every_step_in_order():
    seen: list[dict[str, float]] = []
    result = fit(MODEL, TRAIN, sampler(), validation=VALIDATION, on_step=seen.append)
    assert seen == result.metrics
    assert [m["step"] for m in seen] == list(range(1, 25))
    assert [m["learning_rate"] for m in seen] == [learning_rate(s, TRAIN) for s in range(24)]
    assert all(math.isfinite(v) and v > 0 for m in seen for v in m.values())
    validated = {m["step"]: m["separation"] for m in seen if "separation" in m}
    assert list(validated) == [6, 12, 18, 24]
    assert result.separation == max(validated.values()) == validated[result.best_step]


def test_first_loss_is_that_of_the_initial_weights():
    """The loop adds nothing to the definition: loss of step 1 without dropout, computed by hand."""
    model = MODEL.model_copy(update={"dropout": 0.0})
    start: list[TrainState] = []
    alone = {"negatives": "anchor", "temperature": (0.15,)}
    train = TRAIN.model_copy(update={"steps": 1, "learning_rate": 1e-30, **alone})
    result = fit(model, train, sampler(train), on_checkpoint=lambda s, m: start.append(s))
    encoder = Encoder(model)
    encoder.load_state_dict({k[6:]: x for k, x in start[0].tensors.items() if k.startswith("model.")})
    pool = sampler(train).pool(0)
    first, second, _ = sampler(train).draw(pool, 0)
    with torch.no_grad():
        z = encoder.eval()(collate(pool.sequences, np.r_[first, second], model))
    logits = (z @ z.T / 0.15).masked_fill(torch.eye(20, dtype=torch.bool), -math.inf)
    expected = nn.functional.cross_entropy(logits, (torch.arange(20) + 10) % 20)
    assert result.metrics[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("killed_at", [7, 14])
def test_resumed_run_equals_the_undisturbed_one(killed_at):
    states: dict[int, bytes] = {}

    def keep(state: TrainState | None, metrics: dict[str, float]) -> None:
        assert state.step == metrics["step"]
        states[state.step] = state.to_bytes()

    whole = fit(MODEL, TRAIN, sampler(), validation=VALIDATION, on_checkpoint=keep)
    assert list(states) == [7, 14, 21, 24]
    torch.manual_seed(999)  # nothing may hang on what happened outside
    torch.rand(100)
    state = TrainState.from_bytes(states[killed_at])
    rest = fit(MODEL, TRAIN, sampler(), validation=VALIDATION, start_state=state)
    assert losses(rest.metrics) == losses(whole.metrics)[killed_at:]
    assert (rest.best_step, rest.separation) == (whole.best_step, whole.separation)
    for name, x in whole.encoder.state_dict().items():
        assert torch.equal(x, rest.encoder.state_dict()[name]), name


@pytest.mark.parametrize("stop", [6, 15])
def test_a_run_ended_early_goes_on_as_if_it_had_not_been(stop):
    kept: list[TrainState] = []
    whole = fit(MODEL, TRAIN, sampler(), validation=VALIDATION)
    first = fit(
        MODEL, TRAIN, sampler(), until=stop, validation=VALIDATION, on_checkpoint=lambda s, m: kept.append(s)
    )
    assert (kept[-1].step, "separation" in first.metrics[-1]) == (stop, True)
    rest = fit(MODEL, TRAIN, sampler(), validation=VALIDATION, start_state=kept[-1])
    assert losses(first.metrics) + losses(rest.metrics) == losses(whole.metrics)


def test_a_run_that_is_asked_to_stop_keeps_a_checkpoint_of_its_step():
    """Whatever the step: going on from there is the undisturbed run."""
    kept, asked = [], []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    whole = fit(MODEL, TRAIN, sampler(), validation=VALIDATION)
    first = fit(
        MODEL, TRAIN, sampler(), validation=VALIDATION, stop=stop, on_checkpoint=lambda s, m: kept.append(s)
    )
    assert kept[-1].step == len(first.metrics) == 3
    rest = fit(MODEL, TRAIN, sampler(), start_state=kept[-1], validation=VALIDATION)
    assert losses(first.metrics + rest.metrics) == losses(whole.metrics)


def test_going_on_from_weights_of_another_run():
    train = TRAIN.model_copy(update={"steps": 2, "learning_rate": 1e-30, "start": "other"})
    weights = fit(MODEL, TRAIN, sampler()).encoder.state_dict()
    moved = fit(MODEL, train, sampler(), start_state=TrainState.starting_from(weights, MODEL, train))
    assert [m["step"] for m in moved.metrics] == [1, 2]
    for name, x in moved.encoder.state_dict().items():
        torch.testing.assert_close(x, weights[name])


def test_best_weights_survive_a_restart_after_the_best_step():
    kept: list[TrainState] = []
    fit(MODEL, TRAIN, sampler(), validation=VALIDATION, on_checkpoint=lambda s, m: kept.append(s))
    done = fit(MODEL, TRAIN, sampler(), validation=VALIDATION, start_state=kept[-1])
    assert done.metrics == []
    assert done.separation == kept[-1].best_separation
    assert separation(done.encoder, VALIDATION, "cpu", "float32") == pytest.approx(done.separation, abs=1e-6)


def test_random_state_and_threads_outside_are_left_alone():
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    fit(MODEL, TRAIN.model_copy(update={"steps": 2}), sampler())
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_patience_ends_what_gets_no_better(tmp_path):
    """With a tiny rate nothing changes after the first validation; the rest is as if it had been the plan."""
    train = TRAIN.model_copy(update={"patience": 2, "learning_rate": 1e-30})
    kept: list[TrainState] = []
    result = fit(
        MODEL, train, sampler(train), validation=VALIDATION, on_checkpoint=lambda s, m: kept.append(s)
    )
    assert (result.best_step, len(result.metrics)) == (6, 18)
    assert [state.step for state in kept] == [7, 14, 18]
    again = fit(MODEL, train, sampler(train), validation=VALIDATION, start_state=kept[-1])
    assert again.metrics == [] and again.separation == result.separation
    mp.spawn(_patient, (str(tmp_path),), nprocs=2)
    assert [Path(tmp_path, str(rank)).read_text() for rank in (0, 1)] == ["18", "18"]


def _patient(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train = TRAIN.model_copy(update={"patience": 2, "learning_rate": 1e-30})
    result = fit(MODEL, train, sampler(train, rank, 2), validation=VALIDATION)
    Path(folder, str(rank)).write_text(str(len(result.metrics)))
    dist.destroy_process_group()


def test_checkpoint_of_another_architecture_is_refused():
    kept: list[TrainState] = []
    train = TRAIN.model_copy(update={"steps": 1})
    fit(MODEL, train, sampler(train), on_checkpoint=lambda s, m: kept.append(s))
    wide = MODEL.model_copy(update={"d_ff": 32})
    with pytest.raises(ModelError, match="another architecture"):
        fit(wide, train, sampler(train), start_state=replace(kept[0], settings=digest(wide, train)))


def test_checkpoint_of_other_settings_is_refused():
    kept: list[TrainState] = []
    train = TRAIN.model_copy(update={"steps": 1})
    fit(MODEL, train, sampler(train), on_checkpoint=lambda s, m: kept.append(s))
    with pytest.raises(ModelError, match="other settings"):
        fit(MODEL, TRAIN, sampler(), start_state=kept[0])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 64]
)
def test_damaged_checkpoint_is_refused(damage):
    state = TrainState(3, "abc", {"model.x": torch.ones(100)}, 2, 0.5)
    again = TrainState.from_bytes(state.to_bytes())
    assert (again.step, again.settings, again.best_step, again.best_separation) == (3, "abc", 2, 0.5)
    assert torch.equal(again.tensors["model.x"], torch.ones(100))
    with pytest.raises(ModelError, match="damaged"):
        TrainState.from_bytes(damage(state.to_bytes()))


def test_divergence_is_diagnosed():
    train = TRAIN.model_copy(update={"learning_rate": 1e30, "clip_norm": None, "warmup_steps": 0})
    with pytest.raises(ModelError, match=r"step \d+.*learning rate 1e\+30.*lower train.learning_rate"):
        fit(MODEL, train, sampler(train))


def test_inputs_that_are_not_finite_are_named(monkeypatch):
    def broken(*arguments):
        batch = collate(*arguments)
        batch["gap"][0, 0] = math.nan
        return batch

    monkeypatch.setattr("rayscan.model.sampling.collate", broken)
    with pytest.raises(DataError, match=r"step 1: .*not finite: gap"):
        fit(MODEL, TRAIN, sampler())


def test_schedule():
    train = TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, schedule="cosine")
    assert learning_rate(0, train) == pytest.approx(0.2)
    assert learning_rate(9, train) == learning_rate(10, train) == 2.0
    assert learning_rate(60, train) == pytest.approx(1.0)
    assert 0 < learning_rate(109, train) < 0.001
    constant = train.model_copy(update={"schedule": "constant"})
    assert {learning_rate(s, constant) for s in range(10, 110)} == {2.0}


def test_only_matrices_decay():
    encoder = Encoder(MODEL)
    decaying, others = parameter_groups(encoder, TRAIN)
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decaying["params"])
    left = {names[id(p)] for p in others["params"]}
    assert {"tokens.parts.dst_port.own.weight", "counts.weight"} <= left
    assert {name for name in names.values() if "norm" in name or name.endswith("bias")} <= left
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    assert (decaying["weight_decay"], others["weight_decay"]) == (TRAIN.weight_decay, 0.0)
    (everything,) = parameter_groups(encoder, TRAIN.model_copy(update={"decay": "all"}))
    assert len(everything["params"]) == len(names)


def test_clipping_limits_the_step():
    """With a tiny limit, Adam's first moments stay below it."""
    kept: list[TrainState] = []
    train = TRAIN.model_copy(update={"steps": 1, "clip_norm": 1e-3})
    result = fit(MODEL, train, sampler(train), on_checkpoint=lambda s, m: kept.append(s))
    moments = torch.cat([x.flatten() for k, x in kept[0].tensors.items() if k.startswith("exp_avg.")])
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) * gradient
    assert result.metrics[0]["gradient_norm"] > 1e-2  # reported as it was


def test_bfloat16_trains_as_float32_does():
    """The same batches and dropout, so the same curve but for rounding. It is stored and resumed alike."""
    rough = TRAIN.model_copy(update={"precision": "bfloat16"})
    exact, found = (fit(MODEL, train, sampler(train), validation=VALIDATION) for train in (TRAIN, rough))
    assert losses(found.metrics) != losses(exact.metrics)
    np.testing.assert_allclose(losses(found.metrics), losses(exact.metrics), rtol=0.1)
    np.testing.assert_allclose(losses(found.metrics)[:5], losses(exact.metrics)[:5], rtol=0.005)
    assert found.separation == pytest.approx(exact.separation, abs=0.02)
    assert {p.dtype for p in found.encoder.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")  # of what torch does inside
def test_fused_layers_train_as_others_do():
    still = MODEL.model_copy(update={"dropout": 0.0})  # fused, dropout draws other numbers
    train = TRAIN.model_copy(update={"steps": 3})
    fused = train.model_copy(update={"compile": True})
    exact, found = (fit(still, one, sampler(one), validation=VALIDATION) for one in (train, fused))
    np.testing.assert_allclose(losses(found.metrics), losses(exact.metrics), rtol=1e-4)
    assert found.separation == pytest.approx(exact.separation, abs=1e-3)


def test_auroc_against_all_pairs():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 40) / 5, rng.integers(0, 5, 70) / 5
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(np.mean(pairs))
    with pytest.raises(DataError):
        auroc(positive, negative[:0])


# ---------------------------------------------------------------------------------------------
# Embedding
# ---------------------------------------------------------------------------------------------


def test_embedding_does_not_depend_on_packing():
    torch.manual_seed(0)
    encoder = Encoder(MODEL).train()
    shuffled = np.random.default_rng(0).permutation(len(DATA))
    exact = embed(encoder, DATA, 10**6, precision="float32")
    for precision, within in (("float32", 1e-5), ("bfloat16", 2e-2)):
        whole = embed(encoder, DATA, 10**6, precision=precision)
        assert encoder.training
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, exact, atol=within)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
        for tokens in (1, 64, 1000):
            found = embed(encoder, DATA, tokens, precision=precision)
            np.testing.assert_allclose(found, whole, atol=within)
        found = embed(encoder, DATA.take(shuffled), 500, precision=precision)
        np.testing.assert_allclose(found, whole[shuffled], atol=within)
        assert embed(encoder, DATA.take(np.arange(0)), 100, precision=precision).shape == (0, 8)


@pytest.mark.parametrize("tokens", [1, 16, 100, 10**9])
def test_batches_hold_everything_once_within_the_limit(tokens):
    lengths = np.random.default_rng(1).integers(1, 40, 300)
    batches = list(packed(lengths, tokens))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    for i, rows in enumerate(batches):
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= tokens
        if i + 1 < len(batches):  # and as much as fits
            longer = lengths[batches[i + 1][0]]
            assert (len(rows) + 1) * longer > tokens


def test_broken_weights_are_not_embedded_with():
    encoder = Encoder(MODEL)
    encoder.project[0].bias.data[0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        embed(encoder, DATA, 1000)


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------

WITHOUT_DROPOUT = MODEL.model_copy(update={"dropout": 0.0})
UNEVEN = TRAIN.model_copy(update={"steps": 8, "batch_sources": 9, "checkpoint_every": 4})


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states: list[TrainState | None] = []
    result = fit(
        WITHOUT_DROPOUT,
        UNEVEN,
        sampler(UNEVEN, rank, 2),
        validation=VALIDATION,
        on_checkpoint=lambda s, m: states.append(s),
    )
    assert [s is not None for s in states] == [rank == 0] * 2
    torch.save(
        (losses(result.metrics), result.encoder.state_dict(), result.separation), f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    one = fit(WITHOUT_DROPOUT, UNEVEN, sampler(UNEVEN), validation=VALIDATION)
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    results = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in (0, 1)]
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][0], losses(one.metrics), atol=1e-4)
    assert results[0][2] == pytest.approx(one.separation, abs=1e-3)
    for name, x in one.encoder.state_dict().items():
        torch.testing.assert_close(results[0][1][name], x, atol=2e-3, rtol=0)

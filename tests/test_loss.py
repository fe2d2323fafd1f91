"""The loss against hand-computed numbers and a double loop, on one process and on two."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from rayscan.model.loss import gather_with_gradient, global_nt_xent, nt_xent


def at_angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def slow(z: torch.Tensor, source: torch.Tensor, temperature: float, negatives: str) -> float:
    """The definition, pair by pair."""
    z, terms = z.double(), []
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if source[i] != source[j]]
    of_batch = sum(math.exp(float(z[i] @ z[j]) / temperature) for i, j in pairs) / len(z)
    for i in range(len(z)):
        s = [math.exp(float(z[i] @ z[j]) / temperature) for j in range(len(z))]
        positives = [j for j in range(len(z)) if j != i and source[j] == source[i]]
        of_anchor = sum(s[j] for j in range(len(z)) if source[j] != source[i])
        against = of_anchor if negatives == "anchor" else of_batch
        if positives:
            terms.append(sum(-math.log(s[j] / (s[j] + against)) for j in positives) / len(positives))
    return sum(terms) / len(terms) if terms else 0.0


def test_hand_computed():
    # Two sources, each with two equal vectors, at right angles to each other; temperature 1:
    # every anchor has one positive of cosine 1 and two negatives of cosine 0.
    z, source = at_angles(0, 90, 0, 90), torch.tensor([0, 1, 0, 1])
    assert nt_xent(z, source, (1.0,)).item() == pytest.approx(math.log((math.e + 2) / math.e), abs=1e-6)
    # At temperature 0.5 the logits double.
    expected = math.log((math.exp(2) + 2) / math.exp(2))
    assert nt_xent(z, source, (0.5,)).item() == pytest.approx(expected, abs=1e-6)
    # Positives at 60 degrees (cosine 1/2) from each other, the other source opposite.
    z = at_angles(0, 60, 180, 240)
    expected = math.log((math.exp(0.5) + math.exp(-1) + math.exp(-0.5)) / math.exp(0.5))
    assert nt_xent(z, torch.tensor([0, 0, 1, 1]), (1.0,)).item() == pytest.approx(expected, abs=1e-6)


def test_pairs_are_simclrs_cross_entropy():
    torch.manual_seed(0)
    z = F.normalize(torch.randn(20, 8), dim=1).requires_grad_()
    logits = (z @ z.T / 0.07).masked_fill(torch.eye(20, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(logits, (torch.arange(20) + 10) % 20)
    loss = nt_xent(z, torch.arange(10).repeat(2), (0.07,))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("negatives", ["anchor", "batch"])
@pytest.mark.parametrize("source", [[0, 1, 0, 1, 0], [3, 3, 3, 3, 1, 1, 2], [5, 5, 5, 1, 2, 3]])
def test_many_positives_and_single_sources(source, negatives):
    torch.manual_seed(1)
    source = torch.tensor(source)
    z = F.normalize(torch.randn(len(source), 5), dim=1)
    one, two = (slow(z, source, temperature, negatives) for temperature in (0.2, 0.05))
    assert nt_xent(z, source, (0.2,), negatives).item() == pytest.approx(one, rel=1e-5)
    assert nt_xent(z, source, (0.2, 0.05), negatives).item() == pytest.approx((one + two) / 2, rel=1e-5)


def test_same_source_never_repels():
    """Equal vectors within a source, opposite ones between: nothing is left to gain, however many there are.
    A softmax with the other positives in its denominator would still give log 4 here."""
    z = at_angles(0, 0, 0, 0, 0, 180, 180, 180, 180, 180).requires_grad_()
    loss = nt_xent(z, torch.arange(2).repeat_interleave(5), (0.1,))
    assert loss.item() < 1e-6
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6


@pytest.mark.parametrize("negatives", ["anchor", "batch"])
@pytest.mark.parametrize("source", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_nothing_to_contrast_is_zero_and_finite(source, negatives):
    z = at_angles(0, 10, 20, 30).requires_grad_()
    loss = nt_xent(z, torch.tensor(source), (0.1,), negatives)
    gradient = torch.autograd.grad(loss, z)[0]
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_bfloat16_vectors_are_compared_in_float32():
    z = at_angles(0, 90, 0, 90).bfloat16()
    assert nt_xent(z, torch.tensor([0, 1, 0, 1]), (1.0,)).dtype == torch.float32


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------

SIZES = (7, 4)
SOURCES = torch.tensor([0, 1, 2, 0, 1, 3, 3, 2, 4, 4, 0])  # positives across the border, three of source 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def inputs() -> torch.Tensor:
    return torch.randn(sum(SIZES), 6, generator=torch.Generator().manual_seed(5))


def _process(rank: int, folder: str, negatives: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    begin = sum(SIZES[:rank])
    mine = slice(begin, begin + SIZES[rank])
    net = nn.parallel.DistributedDataParallel(network())
    z = F.normalize(net(inputs()[mine]), dim=1)
    loss = global_nt_xent(z, SOURCES[mine], (0.2, 0.05), SIZES, negatives)
    loss.backward()
    gathered, source, offset = gather_with_gradient(z.detach(), SOURCES[mine], SIZES)
    gradients = [p.grad for p in net.module.parameters()]
    torch.save((loss.detach(), gradients, gathered, source, offset), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("negatives", ["anchor", "batch"])
def test_two_processes_equal_one(negatives):
    net = network()
    z = F.normalize(net(inputs()), dim=1)
    expected = nt_xent(z, SOURCES, (0.2, 0.05), negatives)
    expected.backward()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder, negatives), nprocs=2)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]
    mean = sum(loss.item() for loss, *_ in results) / 2
    assert mean == pytest.approx(expected.item(), abs=1e-5)
    for rank, (_, gradients, gathered, source, offset) in enumerate(results):
        assert offset == (0, 7)[rank]
        torch.testing.assert_close(gathered, z.detach(), atol=1e-6, rtol=0)
        assert source.tolist() == SOURCES.tolist()
        for ours, p in zip(gradients, net.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad, atol=1e-5, rtol=1e-4)


def test_one_process_needs_no_group():
    z, source = at_angles(0, 60, 180, 240), torch.tensor([0, 0, 1, 1])
    assert global_nt_xent(z, source, (1.0,), (4,)) == nt_xent(z, source, (1.0,))

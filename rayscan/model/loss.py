"""The contrastive loss over a global batch, on one process or several.

For an anchor i, its positives P(i) are the other vectors of its source and its negatives N(i) those of other
sources. With s = cosine / temperature,

    loss_i = mean over p in P(i) of  −log( e^{s_ip} / (e^{s_ip} + Σ_{n in N(i)} e^{s_in}) )

and the loss is the mean over the anchors that have a positive. With two vectors of each source this is
NT-Xent (Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020). With
more, positives do not push each other away, as they would as terms of one softmax.

That asks of a pair to be more alike than others of *its anchor*. Clustering holds all pairs against one
threshold, and so does AUROC; `negatives="batch"` therefore puts the mean of this sum over all anchors in its
place: every pair of one source is held against all pairs of different sources in the batch.

Of several temperatures the mean of the losses is taken: a low one looks at the most similar of the negatives
alone, a higher one at all of them.

Under W processes the vectors are gathered with their gradient, and each process takes the loss of its own
anchors against all vectors, so that none computes the whole N×N matrix.

Shapes: N vectors, A of them anchors, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Negatives = Literal["anchor", "batch"]


def nt_xent(
    z_ND: Tensor, source_N: Tensor, temperatures: Sequence[float], negatives: Negatives = "anchor"
) -> Tensor:
    """Contrastive loss (scalar, float32) of unit vectors `z_ND` that stem from the sources `source_N`.

    0 with a gradient of 0 if no source occurs twice or there is only one source.
    """
    return global_nt_xent(z_ND, source_N, temperatures, (len(z_ND),), negatives)


def global_nt_xent(
    z_AD: Tensor,
    source_A: Tensor,
    temperatures: Sequence[float],
    sizes: Sequence[int],
    negatives: Negatives = "anchor",
) -> Tensor:
    """This process's part of `nt_xent` over the vectors of all processes of the default group.

    `sizes` says how many vectors each process holds; they may differ. The part is scaled by the number of
    processes, so that the *mean* over processes is the loss of the whole batch, and the mean of the
    gradients, which DistributedDataParallel takes, is its gradient. (The gather's backward pass has by then
    summed what every process's part adds to a vector.) One size alone means one process: plain `nt_xent`.
    """
    several = len(sizes) > 1
    z_ND, source_N, offset = gather_with_gradient(z_AD, source_A, sizes) if several else (z_AD, source_A, 0)
    cosine_AN = z_AD.float() @ z_ND.float().T
    same_AN = source_A[:, None] == source_N
    rows = torch.arange(len(z_AD), device=z_AD.device)
    positive_AN = same_AN.index_put(
        (rows, rows + offset), torch.zeros((), dtype=torch.bool, device=z_AD.device)
    )
    losses = []
    for temperature in temperatures:
        logits_AN = cosine_AN / temperature
        # The lowest finite number instead of -inf: with no negative at all, the gradient is 0 and not NaN.
        against_A = logits_AN.masked_fill(same_AN, torch.finfo(logits_AN.dtype).min).logsumexp(dim=1)
        if negatives == "batch":
            against_N = gather_with_gradient(against_A[:, None], source_A, sizes)[0] if several else against_A
            against_A = (against_N.flatten().logsumexp(dim=0) - math.log(len(source_N))).expand(len(z_AD))
        losses.append(F.softplus(against_A[:, None] - logits_AN))
    pair_AN = torch.stack(losses).mean(dim=0)
    losses_A = pair_AN.masked_fill(~positive_AN, 0).sum(dim=1) / positive_AN.sum(dim=1).clamp(min=1)
    anchors = ((source_N[:, None] == source_N).sum(dim=1) > 1).sum()
    return losses_A.sum() * len(sizes) / anchors.clamp(min=1)


def gather_with_gradient(z_AD: Tensor, source_A: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """The vectors and sources of all processes in order of rank, and where this process's begin.

    `sizes` are the values of A; known beforehand, they spare a GPU the wait for an exchange. The gradient of
    the gathered vectors, *summed* over processes, flows back into each process's own. All processes must
    run both the forward and the backward pass.
    """
    z_ND: Tensor = _Gather.apply(z_AD, sizes)  # type: ignore[no-untyped-call]
    source_N = _unpad(_all_gather(_pad(source_A, max(sizes))), sizes)
    return z_ND, source_N, sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_AD: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        return _unpad(_all_gather(_pad(z_AD, max(sizes))), sizes)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        grad_ND = grad_ND.contiguous()
        dist.all_reduce(grad_ND)
        begin = sum(ctx.sizes[: dist.get_rank()])
        return grad_ND[begin : begin + ctx.sizes[dist.get_rank()]], None


def _all_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def _pad(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))]) if len(x) < rows else x


def _unpad(parts: list[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

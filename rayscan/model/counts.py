"""What a sequence consists of, counted: the part of the encoder that needs no order and little training.

Which services a source asks for, at which hosts, how long it waits: counts of such features tell sources
apart before anything is learned, also by values that training never saw. A transformer that is
trained for minutes does not find them by itself, and learns its training sources by heart instead. So
each feature of each flow is hashed to a row of one table, and the rows of a sequence are added up. At first
that is a random projection of the counts, whose cosine is about theirs (Weinberger et al., Feature hashing
for large scale multitask learning, 2009); training then weighs and turns the rows it meets. A feature that
occurs n times in a sequence adds √n rows and not n: a thousand flows to one port say little more than a
hundred.

Times of day and dates are no features: they tell when somebody scanned and not how.

Shapes: B sequences, L flows, F features, D dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayscan.model.features import GAP_CENTRE, GAP_SPREAD

_HASH_1, _HASH_2 = -7046029254386353131, -4658895280553007687
"""Odd multipliers of SplitMix64 (Steele et al. 2014), as signed numbers."""


class Counts(nn.Module):
    """A batch of `features.collate` to vectors [B, D] of length √D / 2: of the order of a linear map's."""

    def __init__(self, inputs: tuple[str, ...], rows: int, width: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, width = self.weight.shape
        values_BFL = torch.stack(list(features(batch, self.inputs).values()), dim=1)
        row_BFL = hashed(values_BFL, rows)
        # Padding sorts to the end and weighs nothing. Equal rows then stand side by side, which is how
        # they are counted; their order does not matter to a sum.
        row_BFL, _ = row_BFL.masked_fill(~batch["mask"].unsqueeze(1), rows).sort(dim=-1)
        times_BFL = torch.searchsorted(row_BFL, row_BFL, right=True) - torch.searchsorted(row_BFL, row_BFL)
        share_BFL = (row_BFL < rows) / times_BFL.to(self.weight.dtype).sqrt()
        sum_BD = F.embedding_bag(
            row_BFL.clamp(max=rows - 1).flatten(1),
            self.weight,
            mode="sum",
            per_sample_weights=share_BFL.to(self.weight.dtype).flatten(1),
        )
        return F.normalize(sum_BD, dim=-1) * (math.sqrt(width) / 2)


def features(batch: dict[str, Tensor], inputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Each flow's features as integers, int64 [B, L] each, by name: those whose inputs there are.

    The value of every input; service with destination and with what was asked before; gaps at one, two and
    four steps an octave, with service, destination and the gap before; the steps from one flow to the next.
    """
    found: dict[str, Tensor] = {name: batch[name] for name in inputs if name != "gap"}
    if "dst_port" in inputs:
        service = service_of(batch)
        found |= {"service": service, "next service": _pair(service, _before(service)), "page": service >> 16}
        if "dst" in inputs:
            found["direction"] = _pair(_direction(batch["dst_port"]), _direction(batch["dst"]))
    if "dst" in inputs:
        found["step"] = batch["dst"] - _before(batch["dst"])
    if "gap" in inputs:
        octaves = (batch["gap"] * GAP_SPREAD + GAP_CENTRE) / math.log(2)
        coarse, gap, fine = (_steps(octaves * n) for n in (1, 2, 4))
        found |= {"coarse gap": coarse, "gap": gap, "fine gap": fine, "next gap": _pair(gap, _before(coarse))}
    for one in ("dst", "gap", "ttl", "size", "tcp_flags", "src_port", "icmp_code"):
        for other in ("service", "dst"):
            if one in found and other in found and one != other:
                found[f"{one} of {other}"] = _pair(found[other], found[one])
    return found


def service_of(batch: dict[str, Tensor]) -> Tensor:
    """Port and protocol as one number, port · 256 + protocol, [B, L]; negative without a port."""
    proto = batch.get("proto")
    return batch["dst_port"] * 256 + (0 if proto is None else proto.clamp(min=0))


def hashed(values_BFL: Tensor, rows: int) -> Tensor:
    """Row of each feature's value in a table, int64 [B, F, L]; equal values of two features differ."""
    salt_F1 = torch.arange(1, values_BFL.shape[1] + 1, device=values_BFL.device).unsqueeze(1)
    return (_mixed(values_BFL + _mixed(salt_F1)) & (2**63 - 1)) % rows


def _mixed(x: Tensor) -> Tensor:
    """A 64-bit hash; products wrap around."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _HASH_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _HASH_2
    return x ^ ((x >> 31) & (2**33 - 1))


def _pair(a: Tensor, b: Tensor) -> Tensor:
    return _mixed(a) + b


def _before(x_BL: Tensor) -> Tensor:
    """The flow before's value; the first has its own."""
    return torch.cat([x_BL[:, :1], x_BL[:, :-1]], dim=1)


def _direction(x_BL: Tensor) -> Tensor:
    return torch.sign(x_BL - _before(x_BL))


def _steps(x_BL: Tensor) -> Tensor:
    """Whole steps; the first flow of a sequence, which has no gap, has a step of its own."""
    steps_BL = torch.floor(x_BL + 1e-3).long()  # off the edges, where rounding would decide
    return torch.cat([torch.full_like(steps_BL[:, :1], -1), steps_BL[:, 1:]], dim=1)

"""What a sequence consists of, counted: the part of the encoder that needs no order and little training.

Which services a source asks for, at which hosts, how long it waits: counts of such features tell sources
apart before anything is learned, also by values that training never saw. A transformer that is
trained for minutes does not find them by itself, and learns its training sources by heart instead. So
each feature of each flow is hashed to a row of one table, and the rows of a sequence are added up. At first
that is a random projection of the counts, whose cosine is about theirs (Weinberger et al., Feature hashing
for large scale multitask learning, 2009); training then weighs and turns the rows it meets. A feature that
occurs n times in a sequence adds √n rows and not n: a thousand flows to one port say little more than a
hundred. A source port adds √(n − 1): most are drawn at random, and only those that tools fix come again. What
only the sequence as a whole has (how many different ports, how long the longest gap) is counted too.

Times of day and dates are no features: they tell when somebody scanned and not how.

Shapes: B sequences, L flows, F features of flows, G of whole sequences, D dimensions.
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

    once_F1: Tensor  # 1 for features of which one occurrence says nothing

    def __init__(self, inputs: tuple[str, ...], rows: int, width: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.1)
        one_flow = torch.zeros(1, 1, dtype=torch.int64)
        names = features(
            {"mask": one_flow, **dict.fromkeys(inputs, one_flow), "gap": one_flow.float()}, inputs
        )
        once_F1 = torch.tensor([[name.startswith("src_port")] for name in names], dtype=torch.int64)
        self.register_buffer("once_F1", once_F1, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, width = self.weight.shape
        mask_BL = batch["mask"]
        found = features(batch, self.inputs)
        row_BFL = hashed(torch.stack(list(found.values()), dim=1), rows)
        # Padding sorts to the end and weighs nothing. Equal rows then stand side by side, which is how
        # they are counted; their order does not matter to a sum.
        row_BFL, _ = row_BFL.masked_fill(~mask_BL.unsqueeze(1), rows).sort(dim=-1)
        first_BFL = torch.searchsorted(row_BFL, row_BFL)
        times_BFL = torch.searchsorted(row_BFL, row_BFL, right=True) - first_BFL
        there_BFL = row_BFL < rows
        share_BFL = there_BFL * (times_BFL - self.once_F1).to(self.weight.dtype).sqrt() / times_BFL
        new_BFL = there_BFL & (first_BFL == torch.arange(row_BFL.shape[-1], device=row_BFL.device))
        whole_BG = torch.cat([_different(new_BFL), *_durations(batch, self.inputs)], dim=1)
        row_BG = hashed(whole_BG.unsqueeze(-1), rows, salt=row_BFL.shape[1]).squeeze(-1)
        share_BG = (mask_BL.sum(dim=1, keepdim=True) ** 0.5 / 2).expand(row_BG.shape)
        sum_BD = F.embedding_bag(
            torch.cat([row_BFL.clamp(max=rows - 1).flatten(1), row_BG], dim=1),
            self.weight,
            mode="sum",
            per_sample_weights=torch.cat([share_BFL.flatten(1), share_BG], dim=1).to(self.weight.dtype),
        )
        return F.normalize(sum_BD, dim=-1) * (math.sqrt(width) / 2)


def features(batch: dict[str, Tensor], inputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Each flow's features as integers, int64 [B, L] each, by name: those whose inputs there are.

    The value of every input; service with destination and with the one and two asked before; gaps at one,
    two and four steps an octave, with service, destination and the gap before; the steps from one flow to
    the next.
    """
    found: dict[str, Tensor] = {name: batch[name] for name in inputs if name != "gap"}
    if "dst_port" in inputs:
        service = service_of(batch)
        two = _pair(service, before(service))
        found |= {"service": service, "next service": two, "page": service >> 16}
        found["third service"] = _pair(two, before(before(service)))
        if "dst" in inputs:
            found["direction"] = _pair(_direction(batch["dst_port"]), _direction(batch["dst"]))
            place = _pair(service, batch["dst"])
            found["next place"] = _pair(place, before(place))
    if "dst" in inputs:
        found["step"] = batch["dst"] - before(batch["dst"])
        found["next step"] = _pair(found["step"], before(found["step"]))
    if "gap" in inputs:
        octaves = _octaves(batch["gap"])
        coarse, gap, fine = (_steps(octaves * n) for n in (1, 2, 4))
        found |= {"coarse gap": coarse, "gap": gap, "fine gap": fine, "next gap": _pair(gap, before(coarse))}
    for one in ("dst", "gap", "ttl", "size", "tcp_flags", "src_port", "icmp_code"):
        for other in ("service", "dst"):
            if one in found and other in found and one != other:
                found[f"{one} of {other}"] = _pair(found[other], found[one])
    return found


def service_of(batch: dict[str, Tensor]) -> Tensor:
    """Port and protocol as one number, port · 256 + protocol, [B, L]; negative without a port."""
    proto = batch.get("proto")
    return batch["dst_port"] * 256 + (0 if proto is None else proto.clamp(min=0))


def hashed(values_BFL: Tensor, rows: int, salt: int = 0) -> Tensor:
    """Row of each feature's value in a table, int64 [B, F, L]; equal values of two features differ.

    `salt` is the number of features that were hashed into the table before.
    """
    salt_F1 = salt + torch.arange(1, values_BFL.shape[1] + 1, device=values_BFL.device).unsqueeze(1)
    return (_mixed(values_BFL + _mixed(salt_F1)) & (2**63 - 1)) % rows


def _different(new_BFL: Tensor) -> Tensor:
    """How many different values each feature takes, four steps an octave, int64 [B, F]."""
    return torch.floor(4 * new_BFL.sum(dim=-1).float().log2() + 0.01).long()


def _durations(batch: dict[str, Tensor], inputs: tuple[str, ...]) -> list[Tensor]:
    """Quartiles of the gaps and their sum, by half octaves and octaves, int64 [B, 1]; -1 without gaps."""
    if "gap" not in inputs:
        return []
    mask_BL, gaps_B1 = batch["mask"], batch["mask"].sum(dim=1, keepdim=True) - 1
    octaves_BL = _octaves(batch["gap"])
    is_gap_BL = mask_BL & (torch.arange(mask_BL.shape[1], device=mask_BL.device) > 0)
    ordered_BL, _ = octaves_BL.masked_fill(~is_gap_BL, math.inf).sort(dim=-1)
    places_B1 = [(quarter * (gaps_B1 - 1) / 4).round().long().clamp(min=0) for quarter in range(5)]
    found = [ordered_BL.gather(1, place_B1) for place_B1 in places_B1]
    milliseconds_BL = torch.exp2(octaves_BL.double()).sub(1).masked_fill(~is_gap_BL, 0)
    found.append(milliseconds_BL.sum(dim=1, keepdim=True).add(1).log2().float())
    shifted = [2 * x_B1 for x_B1 in found] + [x_B1 + 0.5 for x_B1 in found]
    return [torch.floor(x_B1 + 1e-3).masked_fill(gaps_B1 < 1, -1).long() for x_B1 in shifted]


def _octaves(gap_BL: Tensor) -> Tensor:
    """log2(1 + milliseconds) of `features.gap_feature`."""
    return (gap_BL * GAP_SPREAD + GAP_CENTRE) / math.log(2)


def _mixed(x: Tensor) -> Tensor:
    """A 64-bit hash; products wrap around."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _HASH_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _HASH_2
    return x ^ ((x >> 31) & (2**33 - 1))


def _pair(a: Tensor, b: Tensor) -> Tensor:
    return _mixed(a) + b


def before(x_BL: Tensor) -> Tensor:
    """The flow before's value; the first has its own."""
    return torch.cat([x_BL[:, :1], x_BL[:, :-1]], dim=1)


def _direction(x_BL: Tensor) -> Tensor:
    return torch.sign(x_BL - before(x_BL))


def _steps(x_BL: Tensor) -> Tensor:
    """Whole steps; the first flow of a sequence, which has no gap, has a step of its own."""
    steps_BL = torch.floor(x_BL + 1e-3).long()  # off the edges, where rounding would decide
    return torch.cat([torch.full_like(steps_BL[:, :1], -1), steps_BL[:, 1:]], dim=1)

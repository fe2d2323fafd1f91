"""The encoder: sequences of flows to unit vectors, by a transformer and by counting.

The published architecture (Presberger et al., arXiv 2606.04733) is one setting of it (preset `paper`):
tables for the destination's octets, port and protocol and a line for time, concatenated to one token per
flow; four post-norm layers; the mean over flows; a projection of two layers; 1,629,856 parameters. `causal`,
`attention_scale` and `time` of ModelConfig switch what its code does differently from what one would expect.

By default addresses are taken by their bits, services hashed, gaps spread over waves, layers normalise
first, mean, largest and spread over the flows are taken, and the projection of these is added to a linear map
of counted features (`counts`).
docs/benchmarks.md says what each of these is worth.

`Tokens` turns a batch of `features.collate` into tokens. Attention is the fused kernel. Padding stands on the
right, so under a causal mask no flow sees any, and no padding mask is needed there: what is computed at
padding is left out of the mean.

A value that is not recorded embeds to zero in a token rather than to a row of its own: it adds nothing,
costs no parameter, and works for a model whose training data never lacked it. (Counted, it is a value.)

Shapes: B sequences, L flows, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayscan.config import ModelConfig
from rayscan.errors import ModelError
from rayscan.model.counts import Counts, before, hashed, service_of
from rayscan.model.features import GAP_CENTRE, GAP_SPREAD
from rayscan.model.precision import is_bfloat16

OCTET_WIDTH, PORT_WIDTH, PROTO_WIDTH, TIME_WIDTH = 8, 16, 4, 16
SERVICES, PAGE_WIDTH = 4096, 8
HOST_BITS, ADDRESS_WIDTH = 16, 32
WAVES, SHORTEST_WAVE, LONGEST_WAVE = 16, 0.5, 48.0  # periods in units of log(gap): 48 spans all gaps
TTL_WIDTH, SIZE_WIDTH, FLAGS_WIDTH = 8, 8, 8
SIZES = 1501
"""Packet sizes told apart; larger ones, which Ethernet does not carry, count as 1500 bytes."""
FLAGS = 512  # nine TCP flags
SHORT = 64  # flows up to which attention is spelled out in bfloat16 on a CPU
PART_TOKENS, PART_TOKENS_BFLOAT16 = 1024, 4096
"""On a CPU, flows that go through the layers together: more would leave the cache, fewer make calls count."""
CODE_WIDTH = 4  # of ICMP


class Table(nn.Module):
    """Embedding [..., width] of integers [...]; negative ones (missing) give the zero vector."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, value: Tensor) -> Tensor:
        present = (value >= 0).unsqueeze(-1)
        return F.embedding(value.clamp(min=0), self.weight) * present


class Tokens(nn.Module):
    """A batch of flows [B, L] to tokens [B, L, D]: embed each input, concatenate, mix, normalise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inputs = config.inputs
        parts: dict[str, nn.Module] = {}
        width = 0
        self.structure = config.encoding == "structure"
        for name in config.inputs:
            parts[name], size = _structured_part(name) if self.structure else _part(name)
            width += size
        self.parts = nn.ModuleDict(parts)
        self.mix = nn.Linear(width, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.structure and "dst_port" in self.inputs:
            batch = batch | {"dst_port": service_of(batch)}
        if self.structure and "src_port" in self.inputs:
            batch = batch | {"src_port": batch["src_port"] * 256}
        seen = [self.parts[name](batch[name]) for name in self.inputs]
        tokens: Tensor = self.norm(self.mix(torch.cat(seen, dim=-1)))
        return tokens


class Octets(nn.Module):
    """An IPv4 address as its four octets, each with a table of its own, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(Table(256, OCTET_WIDTH) for _ in range(4))

    def forward(self, address: Tensor) -> Tensor:
        missing = address < 0
        shifts = (24, 16, 8, 0)
        octets = [((address >> shift) & 0xFF).masked_fill(missing, -1) for shift in shifts]
        return torch.cat([table(octet) for table, octet in zip(self.tables, octets, strict=True)], dim=-1)


class Bits(nn.Linear):
    """An IPv4 address by its structure: bits of its host part, and those that changed since the flow before.

    A line through bits has no row to leave untrained, and the same address one network further has the same
    vector: what was learned at one telescope holds at another. Host parts are the last HOST_BITS.
    """

    def __init__(self) -> None:
        super().__init__(HOST_BITS + 32, ADDRESS_WIDTH)

    def forward(self, address_BL: Tensor) -> Tensor:
        shifts = torch.arange(32, device=address_BL.device)
        host = ((address_BL.unsqueeze(-1) >> shifts[:HOST_BITS]) & 1) * 2 - 1
        changed = ((address_BL ^ before(address_BL)).unsqueeze(-1) >> shifts) & 1
        bits = torch.cat([host, changed], dim=-1).to(self.weight.dtype)
        return super().forward(bits).masked_fill((address_BL < 0).unsqueeze(-1), 0)


class Clamped(Table):
    """A table whose last row stands for every larger value too."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value.clamp(max=len(self.weight) - 1))


class Line(nn.Linear):
    """A number to a vector, by one line."""

    def __init__(self) -> None:
        super().__init__(1, TIME_WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value.unsqueeze(-1))


class Service(nn.Module):
    """Port and protocol, as `counts.service_of` gives them: a hashed row, and one for the port's high byte.

    Rare ports share rows and pages, so that they are not left untrained; an ICMP type is no port, since
    the protocol is hashed with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own, self.page = Table(SERVICES, PORT_WIDTH), Table(256, PAGE_WIDTH)

    def forward(self, service: Tensor) -> Tensor:
        row = hashed(service.unsqueeze(1), SERVICES).squeeze(1).masked_fill(service < 0, -1)
        return torch.cat([self.own(row), self.page(service >> 16)], dim=-1)


class Waves(nn.Module):
    """A gap, as `features.gap_feature` gives it, and sines and cosines of its logarithm.

    A line tells a millisecond from a week but hardly 60 s from 64 s; short waves do, long ones order them.
    """

    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        ratio = LONGEST_WAVE / SHORTEST_WAVE
        periods = SHORTEST_WAVE * ratio ** (torch.arange(WAVES) / (WAVES - 1))
        self.register_buffer("rate", 2 * math.pi / periods, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angle = (value * GAP_SPREAD + GAP_CENTRE).unsqueeze(-1) * self.rate
        return torch.cat([value.unsqueeze(-1), angle.sin(), angle.cos()], dim=-1)


def _structured_part(name: str) -> tuple[nn.Module, int]:
    """The same with addresses by bits, hashed services and waves."""
    match name:
        case "dst":
            return Bits(), ADDRESS_WIDTH
        case "dst_port" | "src_port":
            return Service(), PORT_WIDTH + PAGE_WIDTH
        case "gap":
            return Waves(), 2 * WAVES + 1
    return _part(name)


def _part(name: str) -> tuple[nn.Module, int]:
    """Module that embeds one input, and its width."""
    match name:
        case "dst":
            return Octets(), 4 * OCTET_WIDTH
        case "dst_port" | "src_port":
            return Table(65536, PORT_WIDTH), PORT_WIDTH
        case "proto":
            return Table(256, PROTO_WIDTH), PROTO_WIDTH
        case "gap":
            return Line(), TIME_WIDTH
        case "ttl":
            return Table(256, TTL_WIDTH), TTL_WIDTH
        case "size":
            return Clamped(SIZES, SIZE_WIDTH), SIZE_WIDTH
        case "tcp_flags":
            return Clamped(FLAGS, FLAGS_WIDTH), FLAGS_WIDTH
        case "icmp_code":
            return Table(256, CODE_WIDTH), CODE_WIDTH
    raise ValueError(f"no embedding for input {name!r}")


class Layer(nn.Module):
    """One transformer layer: attention, then two linear maps with a ReLU between.

    Post-norm, as published, normalises the sum of a branch and what it is added to; pre-norm the branch's
    input, which trains faster, and leaves the sum to a norm after the last layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads, self.causal, self.pre = config.heads, config.causal, config.norm == "pre"
        self.scale = 1 / math.sqrt(d // config.heads if config.attention_scale == "head" else d)
        self.dropout = config.dropout
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm_attention = nn.LayerNorm(d)
        self.widen = nn.Linear(d, config.d_ff)
        self.narrow = nn.Linear(config.d_ff, d)
        self.norm_feed = nn.LayerNorm(d)

    def forward(self, x_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        if self.pre:
            x_BLD = add_dropped(x_BLD, self.attend(self.norm_attention(x_BLD), mask_B11L), p)
            return add_dropped(x_BLD, self.feed(self.norm_feed(x_BLD)), p)
        x_BLD = self.norm_attention(add_dropped(x_BLD, self.attend(x_BLD, mask_B11L), p))
        return self.norm_feed(add_dropped(x_BLD, self.feed(x_BLD), p))  # type: ignore[no-any-return]

    def feed(self, x_BLD: Tensor) -> Tensor:
        return self.narrow(F.relu(self.widen(x_BLD)))  # type: ignore[no-any-return]

    def attend(self, x_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        B, L, D = x_BLD.shape
        qkv_3BHLK = self.qkv(x_BLD).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BHLK = attention(qkv_3BHLK, mask_B11L, self.causal, self.scale)
        return self.out(mixed_BHLK.transpose(1, 2).reshape(B, L, D))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Sequences to unit vectors. `config` says all that is needed to build it again."""

    position: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = Tokens(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.pool = _moments if config.pooling == "moments" else _mean
        self.project = nn.Sequential(
            nn.Linear(config.d_model * (3 if config.pooling == "moments" else 1), config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, config.d_embedding),
        )
        self.counts = Counts(config.inputs, config.counts, config.d_embedding) if config.counts else None
        self.register_buffer("position", sinusoids(256, config.d_model), persistent=False)

    def compile_layers(self) -> None:
        """Have torch.compile fuse what the layers do, from the first batch on; results differ by rounding.

        That takes some 20 s for each kind of batch (length, padding; a few in all) and, on a CPU, a C++
        compiler, else ModelError.
        """
        compiler = os.environ.get("CXX", "g++")
        if next(self.parameters()).device.type == "cpu" and not shutil.which(compiler):
            raise ModelError(
                f"train.compile and embed.compile need a C++ compiler on every machine, and there is no "
                f"{compiler}: install one, name it in the environment variable CXX, or go without"
            )
        self._pooled = torch.compile(self._pooled)  # type: ignore[method-assign]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Unit vectors, float32 [B, d_embedding], of a batch from `features.collate`.

        Every sequence has at least one flow; its vector does not depend on the others in the batch.
        """
        mask_BL = batch["mask"]
        x_BLD = self.tokens(batch)
        x_BLD = x_BLD + self._positions(x_BLD)
        if mask_BL.device.type == "cpu":
            pooled_BD = self._in_parts(x_BLD, mask_BL)
        else:
            pooled_BD = self._pooled(x_BLD, mask_BL, full=False)
        z_BD = self.project(pooled_BD).float()
        if self.counts is not None:
            z_BD = z_BD + self.counts(batch)
        return F.normalize(z_BD, dim=-1)

    def _in_parts(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """`_pooled` of some sequences of like length after the other, so that what a layer works on stays in
        the cache and hardly any padding is computed."""
        longest_first_B = mask_BL.sum(dim=1).argsort(descending=True, stable=True)
        full = bool(mask_BL.all())
        if not full:
            x_BLD, mask_BL = x_BLD.index_select(0, longest_first_B), mask_BL[longest_first_B]
        tokens = PART_TOKENS_BFLOAT16 if is_bfloat16(mask_BL.device) else PART_TOKENS
        parts = max(1, tokens // mask_BL.shape[1])
        pooled = []
        for x_PLD, mask_PL in zip(torch.split(x_BLD, parts), torch.split(mask_BL, parts), strict=True):
            longest = int(mask_PL[0].sum())
            mask_PL = mask_PL[:, :longest]
            pooled.append(self._pooled(x_PLD[:, :longest], mask_PL, full or bool(mask_PL.all())))
        pooled_BD = torch.cat(pooled)
        return pooled_BD if full else pooled_BD.index_select(0, longest_first_B.argsort())

    def _pooled(self, x_BLD: Tensor, mask_BL: Tensor, full: bool) -> Tensor:
        """What the layers make of the tokens, over the flows. `full`: no padding, as far as is known."""
        mask_B11L = None if full or self.config.causal else mask_BL[:, None, None, :]
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask_B11L)
        return self.pool(self.norm(x_BLD), mask_BL, full)

    def _positions(self, x_BLD: Tensor) -> Tensor:
        length = x_BLD.shape[1]
        if length > len(self.position):
            with torch.inference_mode(False):  # the buffer outlives an inference that happens to grow it
                grown = sinusoids(1 << (length - 1).bit_length(), self.config.d_model)
                self.position = grown.to(self.position)
        return self.position[:length]


def attention(qkv_3BHLK: Tensor, mask_B11L: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention [B, H, L, K]; `mask_B11L` is True at flows, of which every sequence has one.

    By PyTorch's fused kernel. In bfloat16 on a CPU that takes up to ten times as long as in float32, so there
    it gets float32; and short sequences, where it gains nothing, go without it.
    """
    slow = qkv_3BHLK.dtype == torch.bfloat16 and qkv_3BHLK.device.type == "cpu"
    if slow and qkv_3BHLK.shape[3] <= SHORT:
        return attention_by_products(qkv_3BHLK, mask_B11L, causal, scale)
    q_BHLK, k_BHLK, v_BHLK = (qkv_3BHLK.float() if slow else qkv_3BHLK).unbind()
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L, is_causal=causal, scale=scale
        )


def attention_by_products(qkv_3BHLK: Tensor, mask_B11L: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`attention` spelled out, with the softmax in float32."""
    _, B, H, L, K = qkv_3BHLK.shape
    q_NLK, k_NLK, v_NLK = qkv_3BHLK.reshape(3, B * H, L, K).unbind()
    if causal:
        blocked = torch.full((L, L), -math.inf).triu(1)
    elif mask_B11L is not None:
        blocked = torch.zeros(mask_B11L.shape).masked_fill(~mask_B11L, -math.inf)
    else:
        blocked = torch.zeros(())
    logits_BHLL = torch.bmm(q_NLK, k_NLK.transpose(1, 2)).float().view(B, H, L, L)
    share_BHLL = torch.add(blocked, logits_BHLL, alpha=scale).softmax(dim=-1)
    return torch.bmm(share_BHLL.to(v_NLK.dtype).view(B * H, L, L), v_NLK).view(B, H, L, K)


def add_dropped(x: Tensor, branch: Tensor, p: float) -> Tensor:
    """x + dropout(branch, p), of the type of x."""
    if p == 0 or branch.device.type != "cpu":
        return x + F.dropout(branch, p)
    added: Tensor = _AddDropped.apply(x, branch, p)  # type: ignore[no-untyped-call]
    return added


class _AddDropped(torch.autograd.Function):
    """`add_dropped` on a CPU.

    PyTorch's dropout draws one number at a time there, a tenth of all training time; here a draw of 64
    bits serves four values. That rounds p to a multiple of 2^-16, which the scale takes into account.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, p: float) -> Tensor:
        n, dropped = branch.numel(), min(round(p * 2**16), 2**16 - 1)
        bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = torch.ge(bits[:n].view(branch.shape), dropped - 2**15, out=torch.empty_like(branch))
        ctx.save_for_backward(keep)
        ctx.value = 2**16 / (2**16 - dropped)
        return torch.addcmul(x, branch, keep, value=ctx.value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (keep,) = ctx.saved_tensors
        nothing = torch.zeros((), dtype=keep.dtype)
        return gradient, torch.addcmul(nothing, gradient.to(keep.dtype), keep, value=ctx.value), None


def _mean(x_BLD: Tensor, mask_BL: Tensor, full: bool) -> Tensor:
    """Mean over the flows, [B, D]; `full` says that there is no padding."""
    if full:
        return x_BLD.mean(dim=1)
    weight_BL = mask_BL.to(x_BLD.dtype)
    with torch.autocast(x_BLD.device.type, enabled=False):  # a sum of hundreds has no bits to spare
        sum_BD = torch.bmm(weight_BL.unsqueeze(1), x_BLD).squeeze(1)
    return sum_BD / weight_BL.sum(dim=1, keepdim=True)


def _moments(x_BLD: Tensor, mask_BL: Tensor, full: bool) -> Tensor:
    """Mean, largest and standard deviation over the flows, [B, 3 D]."""
    mean_BD = _mean(x_BLD, mask_BL, full)
    variance_BD = _mean((x_BLD - mean_BD.unsqueeze(1)).square(), mask_BL, full)
    lowest = torch.finfo(x_BLD.dtype).min
    largest_BD = (x_BLD if full else x_BLD.masked_fill(~mask_BL.unsqueeze(-1), lowest)).amax(dim=1)
    # The root's slope is infinite at 0, where all flows of a sequence are alike.
    return torch.cat([mean_BD, largest_BD, (variance_BD + 1e-6).sqrt()], dim=-1)


def sinusoids(length: int, width: int) -> Tensor:
    """Positional encoding [length, width]: sines in even columns, cosines in odd (Vaswani et al. 2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(length).unsqueeze(1) * rate
    table = torch.empty(length, width)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, : width // 2]
    return table

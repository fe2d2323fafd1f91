"""The encoder against an independent formulation, and what must not change a vector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rayscan.config import ModelConfig, load
from rayscan.model.encoder import Encoder, Tokens, add_dropped, attention, attention_by_products, sinusoids

PAPER = load("paper", env={}).model
SMALL = ModelConfig(d_model=32, layers=2, heads=4, d_ff=64, d_embedding=16)
RANGES = {"dst": 2**32, "dst_port": 2**16, "proto": 2**8, "ttl": 256, "size": 10_000, "tcp_flags": 2**15}
RANGES |= {"src_port": 2**16, "icmp_code": 2**8}


def batch_of(lengths: list[int], config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    batch = {name: rng.integers(0, RANGES[name], shape) * mask for name in config.inputs if name != "gap"}
    batch["gap"] = (rng.normal(size=shape) * mask).astype(np.float32)
    return {name: torch.from_numpy(x) for name, x in (batch | {"mask": mask}).items()}


def encoder_of(config: ModelConfig, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(config).eval()


def test_published_size():
    encoder = Encoder(PAPER)
    assert sum(p.numel() for p in encoder.parameters()) == 1_629_856
    assert encoder.tokens.parts["dst_port"].weight.numel() == 1_048_576


class Reference(nn.Module):
    """The same network from PyTorch's own layers. Their attention always divides by sqrt(d_head), so for the
    published scale the query weights are multiplied by sqrt(d_head / d_model) beforehand."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        c = self.config = encoder.config
        self.encoder = encoder
        self.layers = nn.ModuleList()
        factor = math.sqrt(1 / c.heads) if c.attention_scale == "model" else 1.0
        for own in encoder.layers:
            layer = nn.TransformerEncoderLayer(c.d_model, c.heads, c.d_ff, 0.0, batch_first=True).eval()
            scale = torch.ones(3 * c.d_model)
            scale[: c.d_model] = factor
            layer.self_attn.in_proj_weight.data = own.qkv.weight.data * scale[:, None]
            layer.self_attn.in_proj_bias.data = own.qkv.bias.data * scale
            layer.self_attn.out_proj.load_state_dict(own.out.state_dict())
            for name, part in (
                ("linear1", "widen"),
                ("linear2", "narrow"),
                ("norm1", "norm_attention"),
                ("norm2", "norm_feed"),
            ):
                getattr(layer, name).load_state_dict(getattr(own, part).state_dict())
            self.layers.append(layer)

    def tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts, mine = self.encoder.tokens.parts, []
        for octet, table in enumerate(parts["dst"].tables):
            mine.append(table.weight[(batch["dst"] // 256 ** (3 - octet)) % 256])
        mine += [parts[name].weight[batch[name]] for name in ("dst_port", "proto")]
        mine.append(batch["gap"][..., None] * parts["gap"].weight[:, 0] + parts["gap"].bias)
        return self.encoder.tokens.norm(self.encoder.tokens.mix(torch.cat(mine, -1)))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["mask"]
        length, width = mask.shape[1], self.config.d_model
        angle = [[p / 10_000 ** (2 * (i // 2) / width) for i in range(width)] for p in range(length)]
        position = torch.tensor(
            [[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angle]
        )
        x = self.tokens(batch) + position
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), 1) if self.config.causal else None
        for layer in self.layers:
            x = layer(x, src_mask=causal, src_key_padding_mask=~mask)
        pooled = torch.stack([row[m].mean(0) for row, m in zip(x, mask, strict=True)])
        z = self.encoder.project(pooled)
        return z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 1, 4, 7]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", ["model", "head"])
def test_equals_pytorchs_transformer(lengths, causal, scale):
    encoder = encoder_of(PAPER.model_copy(update={"causal": causal, "attention_scale": scale}))
    batch = batch_of(lengths, encoder.config)
    reference = Reference(encoder)
    with torch.no_grad():
        expected = reference(batch)
        assert (encoder(batch) - expected).abs().max() < 1e-5
    gradient(encoder, encoder(batch))
    ours = [p.grad.clone() for p in encoder.parameters()]
    # The reference holds copies of the layers' weights; the parts they share get equal gradients.
    encoder.zero_grad()
    gradient(encoder, reference(batch))
    shared = [(p, g) for p, g in zip(encoder.parameters(), ours, strict=True) if p.grad is not None]
    assert len(shared) >= 14
    for p, g in shared:
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-3)


def gradient(encoder: Encoder, z: torch.Tensor) -> None:
    encoder.zero_grad()
    (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum().backward()


@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 1, 4, 7], [130, 200, 30]])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_float32_but_for_rounding(lengths, causal):
    """Values and gradients, of short sequences and of long ones."""
    encoder = encoder_of(SMALL.model_copy(update={"causal": causal}))
    batch = batch_of(lengths, encoder.config)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = encoder(batch)
        assert z.dtype == torch.float32
        gradient(encoder, z)
        found.append((z.detach(), torch.cat([p.grad.flatten() for p in encoder.layers.parameters()])))
    (exact, slope), (rough, rough_slope) = found
    assert 0 < (rough - exact).abs().max() < 0.01
    assert F.cosine_similarity(rough_slope, slope, dim=0) > 0.98


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_by_products_is_attention(causal, padded):
    """In float32 the two forms agree to rounding. (Under a causal mask padding needs none.)"""
    torch.manual_seed(0)
    qkv = torch.randn(3, 5, 2, 11, 8)
    mask = (torch.arange(11) < torch.tensor([11, 1, 4, 9, 2])[:, None])[:, None, None]
    mask = mask if padded and not causal else None
    found = attention_by_products(qkv, mask, causal, 0.3)
    torch.testing.assert_close(found, attention(qkv, mask, causal, 0.3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("published", [True, False])
def test_padding_and_company_do_not_matter(causal, published):
    like = {"encoding": "tables", "norm": "post", "pooling": "mean", "counts": 0} if published else {}
    config = SMALL.model_copy(update={"causal": causal, **like})
    encoder = encoder_of(config)
    together = batch_of([3, 12, 1, 7], config)
    with torch.inference_mode():
        all_at_once = encoder(together)
        for row, length in enumerate([3, 12, 1, 7]):
            alone = {name: x[row : row + 1, :length] for name, x in together.items()}
            torch.testing.assert_close(encoder(alone)[0], all_at_once[row], atol=1e-5, rtol=0)
        # Whatever stands in the padding is not looked at.
        junk = {n: torch.where(together["mask"], x, 5) if n != "mask" else x for n, x in together.items()}
        torch.testing.assert_close(encoder(junk), all_at_once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [1, 40], [40, 39, 1]])
def test_finite_with_gradients_under_any_mask(causal, lengths):
    encoder = encoder_of(SMALL.model_copy(update={"causal": causal})).train()
    batch = batch_of(lengths, encoder.config)
    batch["proto"].zero_()  # HOPOPT is a protocol, not padding
    z = encoder(batch)
    gradient(encoder, z)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(len(lengths)))
    assert all(bool(torch.isfinite(p.grad).all()) for p in encoder.parameters())


def test_causal_only_looks_back():
    config = SMALL.model_copy(update={"causal": True, "layers": 1})
    encoder = encoder_of(config)
    x = torch.randn(1, 6, config.d_model)
    changed = x.clone()
    changed[0, 4] += torch.randn(config.d_model)
    difference = (encoder.layers[0](x, None) - encoder.layers[0](changed, None)).abs().sum(-1)[0]
    assert difference[:4].max() < 1e-6
    assert difference[4:].min() > 1e-4


@pytest.mark.parametrize(("published", "moved"), [(False, False), (True, True)])
def test_a_telescope_elsewhere_has_the_same_tokens(published, moved):
    """Its host parts are what they were. The published octets are of one telescope alone."""
    config = PAPER if published else SMALL
    tokens = encoder_of(config).tokens
    here = batch_of([9, 4], config)
    here["dst"] = 0xC0A80000 | (here["dst"] & 0xFFFF)
    there = {**here, "dst": here["dst"] ^ (0xC0A80000 ^ 0x2C0B0000)}
    with torch.no_grad():
        apart = (tokens(here) - tokens(there)).abs().max()
    assert (apart > 0.1) == moved and (moved or apart == 0)
    hosts = {**here, "dst": here["dst"] ^ 1}
    with torch.no_grad():
        assert (tokens(here) - tokens(hosts)).abs().max() > 0.1


def test_counts_are_added_to_the_projection():
    encoder = encoder_of(SMALL)
    batch = batch_of([9, 4], SMALL)
    with torch.no_grad():
        for p in encoder.project.parameters():
            p.zero_()
        expected = F.normalize(encoder.counts(batch), dim=-1)
        torch.testing.assert_close(encoder(batch), expected)


def test_moments_by_hand():
    encoder = encoder_of(SMALL)
    x = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [9.0, 9.0]]])
    padded = encoder.pool(x, torch.tensor([[True, True, False]]), False)
    expected = torch.tensor([[2.0, 5.0, 3.0, 5.0, 1.0, 1e-3]])  # mean, largest, spread (never quite 0)
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.pool(x[:, :2], torch.ones(1, 2, dtype=torch.bool), True), expected)


def test_order_of_flows_matters_and_direction_is_seen():
    encoder = encoder_of(SMALL)
    batch = batch_of([8], SMALL)
    turned = {name: x.flip(1) for name, x in batch.items()}
    with torch.inference_mode():
        assert (encoder(batch) - encoder(turned)).abs().max() > 1e-3


def test_sequences_longer_than_the_table_of_positions():
    encoder = encoder_of(SMALL)
    batch = batch_of([700], SMALL)
    with torch.inference_mode():
        first = encoder(batch)
        torch.testing.assert_close(encoder(batch), first)
    assert len(encoder.position) == 1024
    gradient(encoder.train(), encoder(batch))  # what grew under inference_mode can be trained with
    torch.testing.assert_close(sinusoids(1024, 32)[:256], sinusoids(256, 32))
    assert "position" not in encoder.state_dict()


@pytest.mark.parametrize("encoding", ["structure", "tables"])
def test_missing_values_add_nothing(encoding):
    torch.manual_seed(0)
    tokens = Tokens(ModelConfig(inputs=("dst", "dst_port"), encoding=encoding))
    batch = {"dst": torch.tensor([[-1, 0]]), "dst_port": torch.tensor([[-1, 0]])}
    out = tokens(batch)
    torch.testing.assert_close(out[0, 0], tokens.norm(tokens.mix.bias))
    assert (out[0, 0] - out[0, 1]).abs().max() > 0.1
    out[0, 0].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in tokens.parts.parameters())


def test_every_input_can_be_chosen():
    inputs = ("proto", "ttl", "size", "tcp_flags", "src_port", "icmp_code")
    config = SMALL.model_copy(update={"inputs": inputs})
    encoder = encoder_of(config)
    batch = batch_of([5, 2], config)
    with torch.inference_mode():
        z = encoder(batch)
        for name in config.inputs:
            other = {**batch, name: torch.full_like(batch[name], -1)}
            assert (encoder(other) - z).abs().max() > 1e-4, name


def test_dropout_keeps_mean_and_share():
    torch.manual_seed(0)
    x, branch = torch.zeros(300, 333), torch.ones(300, 333, requires_grad=True)
    out = add_dropped(x, branch, 0.1)
    assert abs((out == 0).float().mean() - 0.1) < 0.004  # about four standard deviations
    assert abs(out.mean() - 1) < 0.005
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.9), rtol=1e-4, atol=0)
    out.sum().backward()
    torch.testing.assert_close(branch.grad, out.detach())
    # No pattern between the four values of one draw, nor between neighbours.
    dropped = (~kept).float().flatten() - 0.1
    assert all(abs((dropped[lag:] * dropped[:-lag]).mean()) < 0.002 for lag in (1, 2, 3, 4))
    torch.testing.assert_close(add_dropped(x, branch, 0.0), F.dropout(branch, 0.0))


def test_dropout_of_a_bfloat16_branch_leaves_the_sum_float32():
    x, branch = torch.ones(50, 40), torch.ones(50, 40, dtype=torch.bfloat16, requires_grad=True)
    out = add_dropped(x, branch, 0.25)
    assert out.dtype == torch.float32
    assert out.unique().tolist() == pytest.approx([1, 1 + 4 / 3], rel=1e-3)
    out.sum().backward()
    assert branch.grad.dtype == torch.bfloat16
    torch.testing.assert_close(branch.grad.float(), out.detach() - 1, rtol=0.01, atol=0)

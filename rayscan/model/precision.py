"""In which precision the encoder multiplies: bfloat16 where the hardware is made for it, else float32.

Tensor cores of a GPU and the matrix tiles (AMX) of recent server processors multiply bfloat16 four times as
fast as float32 and more. Weights, sums, norms, softmax and the loss stay float32. Elsewhere bfloat16 is no
faster, so `auto` does not take it there. Similarities move by some 2e-4 between the two; what it does to
quality: docs/benchmarks.md.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from rayscan.config import Precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which the encoder runs on that device."""
    wanted = arithmetic(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def arithmetic(device: torch.device, precision: Precision) -> str:
    """What `auto` stands for on that device: "bfloat16" or "float32"."""
    if precision == "auto":
        return "bfloat16" if _is_fast(device.type) else "float32"
    return precision


def is_bfloat16(device: torch.device) -> bool:
    """Whether matrix products on that device are bfloat16 in the context that is open."""
    return bool(torch.is_autocast_enabled(device.type))


@lru_cache
def _is_fast(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))

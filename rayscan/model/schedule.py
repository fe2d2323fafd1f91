"""The learning rate over training: up in a line, then down along half a cosine."""

from __future__ import annotations

import math


def warmed_cosine(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Rate of step 0, 1, ..., `steps` - 1.

    Rises by equal amounts from above `floor` to `peak` at step `warmup` - 1, and falls from `peak` at step
    `warmup` towards `floor`, which step `steps` would have.
    """
    if step < warmup:
        return floor + (peak - floor) * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2

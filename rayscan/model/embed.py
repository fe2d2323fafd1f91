"""Vectors of many sequences: packed by length, so that hardly any padding is computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from rayscan.config import Precision
from rayscan.errors import ModelError
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences, collate
from rayscan.model.precision import autocast


def embed(
    encoder: Encoder,
    sequences: Sequences,
    batch_tokens: int,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
) -> NDArray[np.float32]:
    """Unit vectors, float32 (N, d_embedding), in the order of `sequences`; (0, d_embedding) for none.

    A forward pass holds sequences of like length, at most `batch_tokens` flows with padding (but at least
    one sequence). `encoder` is on `device`. A vector depends on the packing by rounding only: about 1e-6 in
    float32, 1e-3 in bfloat16 (`precision.autocast`). Raises ModelError if a vector is not finite.
    """
    device = torch.device(device)
    vectors = np.empty((len(sequences), encoder.config.d_embedding), np.float32)
    was_training = encoder.training
    encoder.eval()
    with torch.inference_mode(), autocast(device, precision):
        for rows in packed(sequences.lengths, batch_tokens):
            batch = to_device(collate(sequences, rows, encoder.config), device)
            vectors[rows] = encoder(batch).cpu().numpy()
    encoder.train(was_training)
    _check_finite(vectors)
    return vectors


def packed(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch, shortest sequences first: as many as fit when padded to the longest."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    begin = 0
    while begin < len(order):
        # The padded size grows with every sequence, so the largest batch that fits is found by bisection.
        low, high = begin + 1, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            if (middle - begin) * ordered[middle - 1] <= batch_tokens:
                low = middle
            else:
                high = middle - 1
        yield order[begin:low]
        begin = low


def device_of(wanted: str) -> torch.device:
    """A device by its name; for "auto" the GPU, where there is one that this PyTorch knows."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if wanted == "auto" else wanted)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device. Copies to a GPU go through pinned memory, so that they overlap its work."""
    if device.type != "cuda":
        return batch
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


def _check_finite(vectors: NDArray[np.float32]) -> None:
    bad = int((~np.isfinite(vectors).all(axis=1)).sum())
    if bad:
        raise ModelError(
            f"{bad} of {len(vectors)} vectors are not finite: the model's weights are broken; train it again"
        )

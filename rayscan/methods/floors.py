"""What a method must beat: port counts, which need no learning, and random vectors, which know nothing.

Port counts are TF-IDF weighted (scikit-learn's smooth form) and scaled to length 1, so that their inner
product is the cosine. They stay sparse and exact: a sequence has at most `length` services, and the
pair statistics take sparse rows. Hashing or capping rare ports to make them dense would cost a hundred
times the products, and a floor that is lower than it should be.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from rayscan.errors import DataError
from rayscan.methods.method import list_column, list_values


def port_vectors(sequences: pa.Table) -> sparse.csr_array:
    """TF-IDF of (proto, dst_port) counts per sequence, rows of length 1: float32 `csr_array` (N, services).

    `sequences` has the list columns `proto` and `dst_port` of `schema.SEQUENCES`. A port that was not
    recorded counts as a port of its own. Services are in order of protocol and port; weights are those
    of these N sequences: ln((1 + N) / (1 + sequences with the service)) + 1. A sequence without flows
    is a row of zeros.
    """
    row, service, n_services = _services(sequences)
    n = sequences.num_rows
    ones = np.ones(len(row))
    counts = sparse.coo_array((ones, (row, service)), shape=(n, n_services)).tocsr()
    counts.sum_duplicates()
    having = np.bincount(counts.indices, minlength=n_services)
    counts.data *= (np.log((1 + n) / (1 + having)) + 1)[counts.indices]
    of_row = np.repeat(np.arange(n), np.diff(counts.indptr))
    lengths = np.sqrt(np.bincount(of_row, counts.data**2, minlength=n))
    counts.data /= lengths[of_row]
    return sparse.csr_array(counts, dtype=np.float32)


def random_unit(n: int, d: int, seed: int) -> NDArray[np.float32]:
    """Directions drawn evenly from the sphere: float32 (n, d), rows of length 1."""
    draws = np.random.default_rng(seed).standard_normal((n, d), np.float32)
    return np.asarray(draws / np.linalg.norm(draws, axis=1, keepdims=True))


def _services(sequences: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """For each flow its sequence (row) and the position of its (proto, port) among those that occur."""
    proto, port = (list_column(sequences, name) for name in ("proto", "dst_port"))
    row = np.asarray(pc.list_parent_indices(proto), np.int64)
    if not np.array_equal(row, np.asarray(pc.list_parent_indices(port), np.int64)):
        raise DataError("lists of proto and dst_port differ in length; make the sequences anew")
    kinds, service = np.unique((list_values(proto) << 32) + list_values(port), return_inverse=True)
    return row, service.astype(np.int64), len(kinds)

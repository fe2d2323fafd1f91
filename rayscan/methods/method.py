"""What another way to embed has to offer, so that clustering, evaluation and report can take its vectors.

A method is a module with two functions and the object they return:

    fit(name, sequences, part, seed) -> Fitted   learns from the rows whose part is `splits.TRAIN`
    load(arrays, facts) -> Fitted                gives back what `fit` made, from `Fitted.arrays` and `.facts`

What a method has learnt is numbers and text and nothing else: arrays go to safetensors, facts to JSON, and
nothing is ever unpickled. Modules are imported when asked for: some need packages that not everyone has.

Methods hold all sequences of a period in memory. They are there to be compared with on the same data, and
their own authors run them so; rayscan's encoder is the one that streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from rayscan.errors import ConfigError, DataError, SchemaError
from rayscan.evaluation.splits import TRAIN
from rayscan.schema import MISSING

Arrays = dict[str, NDArray[Any]]
Facts = dict[str, Any]

METHODS = {
    "port-share": "rayscan.methods.ports",
    "ports-svd": "rayscan.methods.ports",
    "clan": "rayscan.methods.clan",
    "crossmodal": "rayscan.methods.crossmodal",
    "gcn": "rayscan.methods.graph",
    "i-gcn": "rayscan.methods.graph",
    "gcn-gru": "rayscan.methods.graph",
    "i-gcn-gru": "rayscan.methods.graph",
    "darkvec": "rayscan.methods.darkvec",
    "i-darkvec": "rayscan.methods.darkvec",
    "dante": "rayscan.methods.words",
    "ip2vec": "rayscan.methods.words",
}
"""The module of each method."""

ONE_VECTOR_A_SOURCE = ("gcn", "i-gcn", "gcn-gru", "i-gcn-gru", "darkvec", "i-darkvec", "ip2vec")
"""Methods for which sequences of one source (and day, in graphs) have the same vector by construction."""


ABSENT = -1
"""The position of what is not there."""


class Embedded(NamedTuple):
    """Vectors of N sequences.

    vectors   float32 (N, d), rows of length 1; zeros where a sequence is not covered
    covered   bool (N,): the method knows this sequence
    inferred  bool (N,): covered, but by a rule of ours for sources that it has not learnt
    """

    vectors: NDArray[np.float32]
    covered: NDArray[np.bool_]
    inferred: NDArray[np.bool_]

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Embedded:
        """All that have a vector are covered, none is inferred."""
        return cls(vectors, np.asarray(vectors.any(axis=1)), np.zeros(len(vectors), np.bool_))


class Fitted(Protocol):
    """A method that has learnt. `facts` holds "name" and what a reader of the model card wants to know."""

    @property
    def arrays(self) -> Arrays: ...

    @property
    def facts(self) -> Facts: ...

    def embed(self, sequences: pa.Table) -> Embedded:
        """Vectors of a table of `schema.SEQUENCES`, all of one period, in its order."""
        ...


class Method(Protocol):
    """The module of a method."""

    def fit(self, name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> Fitted: ...

    def load(self, arrays: Arrays, facts: Facts) -> Fitted: ...


def method(name: str) -> Method:
    """The module of a method. Raises ConfigError for a name that is none, or whose packages are missing."""
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    try:
        return cast(Method, import_module(METHODS[name]))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"method {name} needs the package {error.name}; install it with pip install 'rayscan[methods]'"
        ) from error


def training_of(sequences: pa.Table, part: NDArray[np.int8]) -> pa.Table:
    """The sequences that may be learnt from."""
    return sequences.filter(pa.array(part == TRAIN))


@dataclass(frozen=True)
class Flows:
    """All flows of a table of sequences, in its order, F of them; int64, -1 where not recorded.

    row       position of its sequence in the table
    src       address
    ts        microseconds UTC
    dst, proto, port
    """

    row: NDArray[np.int64]
    src: NDArray[np.int64]
    ts: NDArray[np.int64]
    dst: NDArray[np.int64]
    proto: NDArray[np.int64]
    port: NDArray[np.int64]

    @property
    def service(self) -> NDArray[np.int64]:
        """Protocol and port as one number."""
        return (self.proto << 32) + self.port


def flows_of(sequences: pa.Table) -> Flows:
    """The flows inside sequences. Raises SchemaError without a needed column, DataError if lists disagree."""
    lists = {name: list_column(sequences, name) for name in ("proto", "dst_port", "gap_us")}
    lengths = np.asarray(pc.list_value_length(lists["gap_us"]), np.int64)
    row = np.repeat(np.arange(sequences.num_rows), lengths)
    values = {name: list_values(column) for name, column in lists.items()}
    dst = list_column(sequences, "dst")
    recorded = pc.is_valid(dst).to_numpy(zero_copy_only=False)[row]
    destinations = list_values(dst)
    if {len(values["proto"]), len(values["dst_port"])} != {len(row)} or len(destinations) != recorded.sum():
        raise DataError("lists of the sequences differ in length; make the sequences anew")
    values["dst"] = np.full(len(row), MISSING)
    values["dst"][recorded] = destinations
    start = sequences["start"].cast(pa.int64()).to_numpy()
    since = np.cumsum(values["gap_us"])
    first = np.r_[0, np.cumsum(lengths)[:-1]] if len(lengths) else lengths
    ts = start[row] + since - since[first][row]
    src = sequences["src"].to_numpy().astype(np.int64)
    return Flows(row, src[row], ts, values["dst"], values["proto"], values["dst_port"])


def list_column(sequences: pa.Table, name: str) -> pa.ListArray:
    """A list column as one array."""
    if name not in sequences.column_names or not pa.types.is_list(sequences.schema.field(name).type):
        raise SchemaError(f"sequences have no list column {name!r}; make the sequences anew")
    return pa.chunked_array(sequences[name]).combine_chunks()


def list_values(lists: pa.ListArray) -> NDArray[np.int64]:
    """The values of lists end to end, int64; nulls become -1."""
    return np.asarray(pc.list_flatten(lists).fill_null(MISSING), np.int64)


def unit_rows(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Rows scaled to length 1, float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)


def positions(known: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each value stands in `known`, which ascends; `ABSENT` for what is not there."""
    place = np.searchsorted(known, values)
    found = place < len(known)
    found[found] = known[place[found]] == values[found]
    return np.where(found, place, ABSENT)


def count_cells(
    row: NDArray[np.int64], column: NDArray[np.int64], shape: tuple[int, int]
) -> sparse.csr_array:
    """How often each cell is named, float32."""
    return sparse.coo_array((np.ones(len(row), np.float32), (row, column)), shape=shape).tocsr()

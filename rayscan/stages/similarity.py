"""The sequences on which similarity is judged: a bounded, seeded sample of each part of the split.

All periods of a source share one bucket number, so one task a bucket can hold a source to its cap. The
sample goes by hashes: it depends neither on the order of files nor on the number of tasks. Labelled
sequences may be rare, so a sample of them alone comes on top.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan.captures.scanners import Scanners
from rayscan.config import EvaluateConfig, RunConfig
from rayscan.errors import DataError
from rayscan.evaluation.parts import sample_rows
from rayscan.evaluation.splits import part_of
from rayscan.planning import ENCODER, Model
from rayscan.progress import track
from rayscan.stages.lists import relabelled
from rayscan.stages.session import run_tasks
from rayscan.tables import File, Workspace

_COLUMNS = ("sequence_id", "src", "index", "sequences", "start", "length", "label", "proto", "dst_port")


@dataclass(frozen=True)
class Sample:
    """Sampled sequences of one part, rows in the order of their ids.

    sequences          columns of the sequences table (without those an evaluation has no use for)
    vectors            float32 (N, d)
    available          sequences of the part before sampling
    available_sources  and their sources
    covered            sequences of the part that have a vector; a method may not know all
    """

    sequences: pa.Table
    vectors: NDArray[np.float32]
    available: int
    available_sources: int
    covered: int


Choose = Callable[[pa.Table], tuple[pa.Table, NDArray[np.int64]]]
"""What is sampled: the table, perhaps with more columns, and the rows to keep. Asked of the sequences of each
bucket and part, then of what was kept of all buckets together."""


@dataclass(frozen=True)
class _Bucket:
    sequences: tuple[File, ...]
    embeddings: tuple[File, ...]  # of the same keys, in the same order; without those that have no vector


def sample_parts(
    workspace: Workspace,
    config: RunConfig,
    model: Model,
    parts: Sequence[int],
    known: Scanners | None = None,
    choose: Choose | None = None,
) -> dict[int, Sample]:
    """A sample of each of these parts (positions in `splits.PART_NAMES`) with its embeddings.

    With `known`, labels are the organisations of known scanners in place of what captures say. `choose` draws
    another sample than that of `EvaluateConfig`.
    """
    buckets = _buckets(workspace, model)
    chosen = choose or partial(_sampled, config.evaluate)

    def work(bucket: _Bucket, known: Scanners | None = None) -> dict[int, Sample]:
        return _sample_bucket(workspace, config, model, bucket, parts, chosen, known)

    found: dict[int, list[Sample]] = {part: [] for part in parts}
    with track("sample", len(buckets), "buckets") as advance:
        for _, samples in run_tasks(work, buckets, cpus=config.resources.embed_cpus, shared=known):
            for part, sample in samples.items():
                found[part].append(sample)
            advance(1, "")
    return {part: _join(samples, chosen) for part, samples in found.items()}


def _buckets(workspace: Workspace, model: Model) -> list[_Bucket]:
    embeddings: dict[tuple[str, str], File] = {}
    for file in workspace.table("embeddings").files({"model": model.id}):
        embeddings[file.key["period"], file.key["bucket"]] = file
    groups: dict[str, list[File]] = defaultdict(list)
    for file in workspace.table("sequences").files():
        if (file.key["period"], file.key["bucket"]) in embeddings or model.method != ENCODER:
            groups[file.key["bucket"]].append(file)
    if not embeddings:
        raise DataError("no sequence is embedded yet; run `rayscan embed` first")
    keys = {bucket: [(f.key["period"], f.key["bucket"]) for f in files] for bucket, files in groups.items()}
    return [
        _Bucket(tuple(files), tuple(embeddings[key] for key in keys[bucket] if key in embeddings))
        for bucket, files in groups.items()
    ]


def _sample_bucket(
    workspace: Workspace,
    config: RunConfig,
    model: Model,
    bucket: _Bucket,
    parts: Sequence[int],
    choose: Choose,
    known: Scanners | None,
) -> dict[int, Sample]:
    table = relabelled(workspace.table("sequences").read_files(bucket.sequences, _COLUMNS), known)
    embedded = workspace.table("embeddings").read_files(bucket.embeddings, ("sequence_id", "vector"))
    ids = table["sequence_id"].to_numpy()
    has = np.isin(ids, embedded["sequence_id"].to_numpy())
    of_all = has.all() or model.method != ENCODER
    if not (of_all and np.array_equal(embedded["sequence_id"].to_numpy(), ids[has])):
        raise DataError(
            f"embeddings of bucket {bucket.sequences[0].key['bucket']} do not belong to its sequences; "
            "run `rayscan embed` again"
        )
    src, index, sequences = (table[name].to_numpy() for name in ("src", "index", "sequences"))
    of_part = part_of(src, index, sequences, config.split)
    place = np.cumsum(has) - 1  # of a sequence's vector
    samples = {}
    for part in parts:
        available = src[of_part == part]
        rows = np.flatnonzero((of_part == part) & has)
        drawn, taken = choose(table.take(rows))
        found = vectors_of(embedded.take(place[rows[taken]]))
        samples[part] = Sample(drawn.take(taken), found, len(available), len(np.unique(available)), len(rows))
    return samples


def _sampled(settings: EvaluateConfig, table: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
    """Rows of the sample, ascending: of all sequences, and of those with a label."""
    ids, src = table["sequence_id"].to_numpy(), table["src"].to_numpy()
    limits = (settings.max_sequences_per_source, settings.max_sequences, settings.seed)
    labelled = np.flatnonzero(pc.is_valid(table["label"]).to_numpy())
    of_labelled = labelled[sample_rows(ids[labelled], src[labelled], *limits)]
    return table, np.union1d(sample_rows(ids, src, *limits), of_labelled)


def _join(samples: list[Sample], choose: Choose) -> Sample:
    table, rows = choose(pa.concat_tables([sample.sequences for sample in samples]))
    filled = [sample.vectors for sample in samples if len(sample.vectors)]
    vectors = np.concatenate(filled) if filled else np.empty((0, 0), np.float32)
    order = rows[np.argsort(table["sequence_id"].to_numpy()[rows], kind="stable")]
    return Sample(
        table.take(order),
        vectors[order],
        sum(sample.available for sample in samples),
        sum(sample.available_sources for sample in samples),
        sum(sample.covered for sample in samples),
    )


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """The `vector` column of a table of embeddings as float32 (N, d); shape (0, 0) for no rows."""
    if table.num_rows == 0:
        return np.empty((0, 0), np.float32)
    column = table["vector"].combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any():
        raise DataError("embeddings of one model have different lengths; run `rayscan embed` again")
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values.reshape(table.num_rows, -1), np.float32)

"""Embeddings to clusters, one period at a time: `clustering.solve_blocked` with Ray tasks as its map.

Tasks get the place of their rows and read the vectors themselves. The driver holds labels and the sums of
clusters, and commits a period's rows at once. A period whose embeddings are damaged, or whose tasks die time
after time, fails and says where; the others are clustered all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan import schema
from rayscan.clustering import Clusters, calibrate, products_on, solve_blocked, weights
from rayscan.clustering.objective import check_embeddings
from rayscan.config import RunConfig
from rayscan.errors import DataError, TaskDied, WorkspaceError
from rayscan.evaluation.splits import VALIDATION
from rayscan.methods.method import ONE_VECTOR_A_SOURCE
from rayscan.planning import Model, Unit, calibration_version
from rayscan.progress import say, track
from rayscan.stages import metrics
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import sample_parts, vectors_of
from rayscan.tables import CommitInfo, File, Workspace


@dataclass
class Counts:
    periods: int = 0
    sequences: int = 0
    clusters: int = 0
    threshold: float = 0.0


@dataclass(frozen=True)
class _Block:
    """Rows of one embeddings file."""

    file: File
    start: int
    stop: int


def run(workspace: Workspace, config: RunConfig, model: Model, due: list[Unit], info: CommitInfo) -> Counts:
    """Cluster every period that is due and commit it."""
    commits = PeriodCommits(workspace, "clusters", due, info)
    threshold, _ = find_threshold(workspace, config, model)
    counts = Counts(threshold=threshold)
    failures: list[str] = []
    with track("cluster", len(due), "periods") as advance:
        for unit in due:
            try:
                files, clusters = _solve_period(workspace, config, unit, threshold)
            except (DataError, TaskDied, WorkspaceError) as error:
                failures.append(f"{unit.key['period']} failed: {error}")
                say(f"cluster: {failures[-1]}")
                advance(1, "")
                continue
            commits.add(unit, files)
            counts.periods += 1
            rows = sum(file.rows for file in files)
            counts.sequences += rows
            counts.clusters += clusters
            metrics.add("clusters", config.run, clusters)
            metrics.add("pairs", config.run, rows * (rows - 1) / 2)
            advance(1, f"{unit.key['period']}: {clusters:,} clusters")
    if failures:
        more = f" ({len(failures) - 1} other periods failed too)" if len(failures) > 1 else ""
        raise DataError(f"{failures[0]}{more}")
    return counts


def find_threshold(
    workspace: Workspace, config: RunConfig, model: Model
) -> tuple[float, dict[str, Any] | None]:
    """The threshold to cluster at, and the calibration it comes from (None where it was given).

    `auto` is calibrated once for a model and kept beside it: later captures must not move the threshold of
    periods that are clustered already.
    """
    there = known_threshold(workspace, config, model)
    if there is not None:
        return there
    if model.method in ONE_VECTOR_A_SOURCE:
        raise DataError(
            f"cluster.threshold auto learns from sequences of one source, and {model.method} has one vector "
            "for all of them: give a number (`rayscan compare` finds those that suit labels)"
        )
    sample = sample_parts(workspace, config, model, [VALIDATION])[VALIDATION]
    src = sample.sequences["src"].to_numpy()
    found = asdict(calibrate(sample.vectors, src, prior=config.cluster.prior, seed=config.evaluate.seed))
    workspace.write_json(_calibration(config, model), found)
    say(f"cluster: threshold {found['threshold']:.3f} from {len(src):,} validation sequences")
    return float(found["threshold"]), found


def known_threshold(
    workspace: Workspace, config: RunConfig, model: Model
) -> tuple[float, dict[str, Any] | None] | None:
    """`find_threshold` where nothing is left to calibrate, else None."""
    given = config.cluster.threshold
    if given != "auto":
        return given, None
    found = workspace.read_json(_calibration(config, model))
    return None if found is None else (float(found["threshold"]), found)


def _calibration(config: RunConfig, model: Model) -> str:
    return f"{model.folder}/calibration-{calibration_version(config, model)}.json"


def _solve_period(
    workspace: Workspace, config: RunConfig, unit: Unit, threshold: float
) -> tuple[list[File], int]:
    """Solve one period and write its rows, without committing them. Returns the files and the clusters."""
    blocks = _blocks(unit.files, config.cluster.block_sequences)
    if not blocks:
        return [], 0
    try:
        solution = solve_blocked(
            partial(_load, workspace, blocks),
            len(blocks),
            threshold,
            seed=config.cluster.seed,
            max_rounds=config.cluster.max_rounds,
            least_gain=config.cluster.least_gain,
            map=_ray_map(config),
        )
    except DataError as error:
        raise _located(workspace, blocks, error) from None
    if stopped := solution.stopped(config.cluster.least_gain):
        say(f"cluster: {unit.key['period']} {stopped} (cluster.max_rounds)")
    write = partial(_write, workspace, unit.key, threshold)
    items = list(zip(blocks, solution.labels, strict=True))
    clusters = solution.clusters
    resources = config.resources
    options: dict[str, Any] = {"cpus": resources.cluster_cpus, "memory_mb": resources.cluster_memory_mb}
    results = run_tasks(write, items, **options, ordered=True, shared=clusters)
    return [file for _, file in results], len(clusters)


def _blocks(files: Iterable[File], size: int) -> list[_Block]:
    return [
        _Block(file, start, min(start + size, file.rows))
        for file in files
        for start in range(0, file.rows, size)
    ]


def _load(workspace: Workspace, blocks: Sequence[_Block], number: int) -> NDArray[np.float32]:
    return vectors_of(_read(workspace, blocks[number], ("vector",)))


def _read(workspace: Workspace, block: _Block, columns: Sequence[str]) -> pa.Table:
    return workspace.table("embeddings").read_rows(block.file, block.start, block.stop, columns)


def _located(workspace: Workspace, blocks: Sequence[_Block], error: DataError) -> DataError:
    """What is wrong with the vectors, with the file: tasks check them but know no files."""
    for number, block in enumerate(blocks):
        try:
            check_embeddings(_load(workspace, blocks, number))
        except DataError as found:
            path = workspace.url(f"embeddings/{block.file.path}")
            return DataError(f"{path}, rows from {block.start} on: {found}")
    return DataError(f"{blocks[0].file.key['period']}: {error}")


def _ray_map(config: RunConfig) -> Callable[[Callable[[Any, Any], Any], Sequence[Any], Any], Iterable[Any]]:
    """The parallel map that the solver asks for: results in the order of the items."""
    resources, where = config.resources, config.cluster.device
    gpus = 0 if where == "cpu" else resources.cluster_gpus or float(where == "cuda")
    device = "cuda" if gpus else None

    def ray_map(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
        def work(item: Any, common: tuple[Any]) -> Any:
            with products_on(device):
                return task(item, common[0])

        options: dict[str, Any] = {
            "cpus": resources.cluster_cpus,
            "gpus": gpus,
            "memory_mb": resources.cluster_memory_mb,
        }
        for _, result in run_tasks(work, items, **options, ordered=True, shared=(shared,)):
            yield result

    return ray_map


def _write(
    workspace: Workspace,
    key: dict[str, str],
    threshold: float,
    item: tuple[_Block, NDArray[np.int64]],
    clusters: Clusters,
) -> File:
    block, labels = item
    columns = ("sequence_id", "src", "vector")
    rows = _read(workspace, block, columns)
    own, best = weights(vectors_of(rows), labels, clusters, threshold)
    table = pa.table(
        {
            "sequence_id": rows["sequence_id"],
            "src": rows["src"],
            "cluster": labels,
            "weight_own": own,
            "weight_next": pa.array(best, from_pandas=True),
        },
        schema=schema.CLUSTERS,
    )
    return workspace.table("clusters").write(table, key)

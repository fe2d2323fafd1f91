"""What is due: every unit of work, the files it is made from, and whether it is done, due or stale.

Nothing here computes or starts Ray, so `status` and `--dry-run` are quick and cannot change anything.

What a unit's fingerprint covers decides what a change costs:
- sequences, per period and bucket: the sequence settings and the flow files of that period and bucket;
- the model: the settings of sequences, split, encoder and training, not the data. A new capture does not
  retrain it, because vectors of two models cannot be compared; `train --fresh` replaces it;
- embeddings, per period and bucket: the model's weights and the sequence files; with a method of others all
  files of the period, since its vectors may depend on them;
- clusters, per period: the threshold, the clustering settings and the period's embedding files;
- campaigns, per period: the period's cluster files, the campaigns of the period before, and the lists of
  known scanners, which are asked nowhere before;
- evaluation and report: whatever they show.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any, Literal

import pyarrow.fs as pafs

import rayscan
from rayscan.captures.detect import READERS
from rayscan.config import CapturesConfig, RunConfig, digest
from rayscan.errors import ConfigError, DataError, why
from rayscan.keys import span_of
from rayscan.storage import filesystem, uri_of
from rayscan.tables import File, Key, Workspace, fingerprint, key_name

State = Literal["done", "due", "stale"]
Groups = dict[tuple[tuple[str, str], ...], list[File]]
"""The files that each key is made of."""

ENCODER = "rayscan"
"""What `train.method` calls rayscan's own encoder."""

_LIBRARIES = ("ray", "torch", "numpy", "pyarrow", "deltalake", "numba", "polars", "openTSNE", "plotly")
_SWITCH = "model.json"
PIPE = "neither a file nor a folder, but a pipe, socket or device"
"""Why such a thing is refused as a capture: reading it would wait for ever, or never come to an end."""

EVALUATION = "evaluation.json"
"""What stage `evaluate` writes for a run."""
PAPER, SEEDS, COMPARISON = "evaluation-paper.json", "evaluation-seeds.json", "comparison.json"
"""What `evaluate --protocol paper`, `evaluate --seeds` and `compare` write; no stages of a run."""

STAGES = ("ingest", "sequences", "train", "embed", "cluster", "campaigns", "evaluate", "report")
REPROCESS = ("ingest", "sequences", "train", "drift", "embed", "cluster", "campaigns", "changes", "pages")
"""What a periodic run does: it looks at what is new, and leaves the evaluation and the whole report alone."""


@dataclass(frozen=True)
class Unit:
    """One piece of work that is committed as a whole."""

    key: dict[str, str]
    files: tuple[File, ...]
    made_from: int
    state: State

    @property
    def name(self) -> str:
        return key_name(self.key)


@dataclass(frozen=True)
class CaptureFile:
    """A file to ingest, as it was found."""

    path: str
    bytes: int
    modified: datetime | None
    state: State = "due"


@dataclass(frozen=True)
class Model:
    """A trained model of the workspace."""

    id: str
    weights: str  # hash of the weights: a model that was trained again is another model
    card: dict[str, Any]
    method: str = ENCODER

    @property
    def folder(self) -> str:
        return f"models/{self.id}"


@dataclass(frozen=True)
class Window:
    """The times that a reprocessing is about: from `since` on and before `until`, where given."""

    since: datetime | None = None
    until: datetime | None = None

    def holds(self, period: str) -> bool:
        """Does any moment of the period lie in the window?"""
        begin, end = span_of(period)
        return (self.since is None or end > self.since) and (self.until is None or begin < self.until)

    def can_hold(self, file: CaptureFile) -> bool:
        """May the capture have flows from `since` on? Not if it was last changed before."""
        return self.since is None or file.modified is None or file.modified >= self.since


def _units(workspace: Workspace, table: str, inputs: Groups, *settings: str) -> list[Unit]:
    """Units of `table` from the files each key is made of, with their states."""
    target = workspace.table(table)
    keys = [dict(key) for key in inputs]
    recorded = target.done(keys)
    units = []
    for key, files in zip(keys, inputs.values(), strict=True):
        made_from = fingerprint(*settings, [file.path for file in files])
        found = recorded[key_name(key)]
        state: State = "due" if found is None else "done" if found == made_from else "stale"
        units.append(Unit(key, tuple(files), made_from, state))
    return units


def _group(files: Iterable[File], names: tuple[str, ...], first: tuple[tuple[str, str], ...] = ()) -> Groups:
    """Files by their values of `names`; `first` stands at the head of each key."""
    groups: Groups = defaultdict(list)
    for file in files:
        groups[*first, *((name, file.key[name]) for name in names)].append(file)
    return dict(sorted(groups.items()))


def _with_old_keys(workspace: Workspace, table: str, groups: Groups, where: Key) -> Groups:
    """Adds keys that the table still holds but that have no input any more: they must become empty."""
    for file in workspace.table(table).files(where):
        groups.setdefault(file.partition, [])
    return dict(sorted(groups.items()))


def find_captures(captures: CapturesConfig, workspace_uri: str | None = None) -> list[CaptureFile]:
    """All files that `captures.paths` names, sorted by path, each once.

    Folders are read recursively, without hidden files, those that begin with `_`, and the workspace itself.
    In a path that is not there as it stands, `*`, `?` and `[...]` match within a name, `**` any number of
    folders; a folder that matches is read whole. What is no regular file is listed too, for ingest to refuse.
    Raises ConfigError for a path that is not there or cannot be listed, when nothing is found at all, and for
    an unknown captures.format.
    """
    if captures.format not in ("auto", *READERS):
        known = ", ".join(("auto", *READERS))
        raise ConfigError(f"captures.format {captures.format!r} is not known; valid are {known}")
    if not captures.paths:
        raise ConfigError("captures.paths is empty: name files, folders or s3:// prefixes to read")
    found: dict[str, CaptureFile] = {}
    for path in captures.paths:
        try:
            files = _list_path(path)
        except OSError as error:
            raise ConfigError(f"captures.paths: cannot list {path}: {why(error)}") from None
        inside = f"{workspace_uri}/" if workspace_uri else None
        found |= {file.path: file for file in files if not (inside and file.path.startswith(inside))}
    if not found:
        raise ConfigError(f"captures.paths {list(captures.paths)} holds no files")
    return [found[path] for path in sorted(found)]


def _list_path(path: str) -> list[CaptureFile]:
    fs, inner = filesystem(path)
    base, pattern = inner, []
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.NotFound and (sign := re.search(r"[*?\[]", inner)):
        base = inner[: sign.start()].rpartition("/")[0]
        pattern = inner.removeprefix(base).strip("/").split("/")
        info = fs.get_file_info(base)
    if info.type == pafs.FileType.NotFound:
        raise ConfigError(f"captures.paths: {path} is not there")
    if info.type == pafs.FileType.Directory:
        infos = [info for info in _below(fs, base) if _is_wanted(info.path.removeprefix(base), pattern)]
    else:
        infos = [info]
    if pattern and not infos:
        raise ConfigError(f"captures.paths: nothing matches {path}")
    return [CaptureFile(uri_of(path, info.path), max(info.size or 0, 0), info.mtime) for info in infos]


def _below(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Everything below a folder but folders. Arrow's own listing runs in circles where links do."""
    if not isinstance(fs, pafs.LocalFileSystem):
        infos = fs.get_file_info(pafs.FileSelector(folder, recursive=True))
        return [info for info in infos if info.type != pafs.FileType.Directory]
    seen: set[str] = set()
    files: list[str] = []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders.sort()  # of two ways to a folder always the same is taken
        files += [f"{place}/{name}" for name in names]
    return list(fs.get_file_info(files))


def _raise(error: OSError) -> None:
    raise ConfigError(f"captures.paths: cannot list {error.filename}: {error.strerror}")


def _is_wanted(relative: str, pattern: list[str]) -> bool:
    parts = [part for part in relative.split("/") if part]
    return not any(part[0] in "._" for part in parts) and _matches(parts, pattern)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path, or a folder that it lies in, fits a pattern; both name by name."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def ingest_version(config: RunConfig) -> int:
    """What the flows of a capture depend on, besides its content."""
    return fingerprint(digest(config.captures, config.ingest))


def capture_units(workspace: Workspace, config: RunConfig) -> list[CaptureFile]:
    """The captures to read, with their states.

    A file is known by path, size and time of change: an archive need not be read to see that it is done.
    """
    found = find_captures(config.captures, workspace.uri)
    rows = workspace.table("captures").read().to_pylist()
    known = {row["path"]: row for row in rows}
    recorded = workspace.table("flows").done([{"capture": row["capture"]} for row in rows])
    wanted = ingest_version(config)

    def state(file: CaptureFile) -> State:
        row = known.get(file.path)
        if row is None:
            return "due"
        same = (row["bytes"], row["modified"]) == (file.bytes, file.modified)
        return "done" if same and recorded[key_name({"capture": row["capture"]})] == wanted else "stale"

    return [replace(file, state=state(file)) for file in found]


def sequence_units(workspace: Workspace, config: RunConfig) -> list[Unit]:
    groups = _group(workspace.table("flows").files(), ("period", "bucket"))
    groups = _with_old_keys(workspace, "sequences", groups, {})
    return _units(workspace, "sequences", groups, digest(config.sequences))


def model_id(config: RunConfig) -> str:
    """Name of the model that these settings ask for."""
    train = config.train
    if train.method != ENCODER:
        chosen = digest(train.method, train.seed, *train.periods)
        return digest(config.sequences, config.split, chosen, config.ingest.period)
    return digest(config.sequences, config.split, config.model, config.train, config.ingest.period)


def sweep_id(config: RunConfig) -> str:
    """Name of the sweep that these settings ask for."""
    return digest(model_id(config), config.tune)


def current_model(workspace: Workspace, config: RunConfig) -> str:
    """Name of the model that a run uses: the one that is named, or switched to, or that the settings ask for.

    A switch holds for the settings it was made under: others ask for a model of their own.
    """
    if config.embed.model is not None:
        return config.embed.model
    asked = model_id(config)
    switched = workspace.read_json(run_file(config, _SWITCH))
    return str(switched["model"]) if switched and switched["asked"] == asked else asked


def switch_model(workspace: Workspace, config: RunConfig, name: str, why: str) -> str:
    """From now on the run uses another model, which must be there; the name of the one it used before."""
    before = current_model(workspace, config)
    facts = {"asked": model_id(config), "model": name, "before": before, "why": why}
    workspace.write_json(run_file(config, _SWITCH), facts)
    return before


def find_model(workspace: Workspace, config: RunConfig) -> Model | None:
    """The model that a run uses, or None when it is not there yet."""
    return stored_model(workspace, current_model(workspace, config))


def stored_model(workspace: Workspace, name: str) -> Model | None:
    """A model of the workspace by its name, or None when it is not there yet."""
    facts = workspace.read_json(f"models/{name}/config.json")  # written last: the artefact is whole
    if facts is None:
        return None
    card = workspace.read_json(f"models/{name}/card.json") or {}
    return Model(name, str(facts["weights"]), card, method_of(facts))


def method_of(facts: dict[str, Any]) -> str:
    """The method whose model has this config.json."""
    return str(facts["method"]["name"]) if "method" in facts else ENCODER


def settled(workspace: Workspace, config: RunConfig, files: list[File]) -> RunConfig:
    """The settings with those optional inputs of the model that all of these sequences record."""
    table = workspace.table("sequences")
    model = config.model.settled(lambda name: table.records(files, name))
    return config.model_copy(update={"model": model})


def training_files(workspace: Workspace, config: RunConfig) -> list[File]:
    """Sequence files to train on. Raises DataError when there are none."""
    return sequence_files(workspace, config.train.periods)


def sequence_files(workspace: Workspace, periods: Iterable[str]) -> list[File]:
    """Sequence files of these periods, or of all. Raises DataError when one of them has none."""
    files = workspace.table("sequences").files()
    if not files:
        raise DataError(
            "there are no sequences: no source has enough flows in one period. "
            "Lower sequences.min_length, or use a longer ingest.period"
        )
    wanted = set(periods)
    unknown = wanted - {file.key["period"] for file in files}
    if unknown:
        raise DataError(f"there are no sequences of {', '.join(sorted(unknown))}")
    return [file for file in files if not wanted or file.key["period"] in wanted]


def data_version(files: Iterable[File]) -> str:
    """Stands for the sequences that a model is trained on; kept in its card."""
    return f"{fingerprint([file.path for file in files]):016x}"


def embed_units(workspace: Workspace, model: Model) -> list[Unit]:
    files = workspace.table("sequences").files()
    groups = _group(files, ("period", "bucket"), (("model", model.id),))
    groups = _with_old_keys(workspace, "embeddings", groups, {"model": model.id})
    if model.method == ENCODER:
        return _units(workspace, "embeddings", groups, model.weights)
    periods: dict[str, Groups] = defaultdict(dict)
    for key, found in groups.items():
        periods[dict(key)["period"]][key] = found
    units = []
    for period in periods.values():
        whole = sorted(file.path for found in period.values() for file in found)
        units += _units(workspace, "embeddings", period, model.weights, *whole)
    return units


def cluster_units(workspace: Workspace, config: RunConfig, model: Model) -> list[Unit]:
    """One unit a period."""
    files = workspace.table("embeddings").files({"model": model.id})
    groups = _group(files, ("period",), (("run", config.run),))
    groups = _with_old_keys(workspace, "clusters", groups, {"run": config.run})
    threshold = calibration_version(config, model) if config.cluster.threshold == "auto" else model.weights
    return _units(workspace, "clusters", groups, digest(config.cluster), threshold)


def calibration_version(config: RunConfig, model: Model) -> str:
    """What a threshold `auto` rests on: the model, and how its validation sequences are sampled."""
    sampling = (config.evaluate.max_sequences, config.evaluate.max_sequences_per_source, config.evaluate.seed)
    return digest(config.cluster.prior, config.split, *sampling, model.weights)


def scanner_version(workspace: Workspace, config: RunConfig) -> str:
    """The lists of known scanners and how they are asked; "" where there is nobody to ask."""
    lists = sorted({file.key["list"] for file in workspace.table("scanners").files()})
    return digest(config.scanners, *lists) if lists and workspace.addresses == "raw" else ""


def campaign_units(workspace: Workspace, config: RunConfig) -> list[Unit]:
    """One unit a period, in time order; each rests on the ones before it."""
    files = workspace.table("clusters").files({"run": config.run})
    groups = _group(files, ("period",), (("run", config.run),))
    units = []
    chain = digest(config.campaigns, scanner_version(workspace, config))
    for key, found in _with_old_keys(workspace, "campaigns", groups, {"run": config.run}).items():
        (unit,) = _units(workspace, "campaigns", {key: found}, chain)
        chain = f"{unit.made_from:x}"
        units.append(unit)
    return units


def evaluation_version(workspace: Workspace, config: RunConfig, model: Model) -> str:
    """What the evaluation of this run rests on."""
    parts = [digest(config.evaluate, config.split), model.weights]
    if config.evaluate.labels != "capture":
        parts.append(scanner_version(workspace, config))
    for table, where in (("embeddings", {"model": model.id}), ("clusters", {"run": config.run})):
        parts += [file.path for file in workspace.table(table).files(where)]
    return f"{fingerprint(parts):016x}"


def paper_version(workspace: Workspace, config: RunConfig, model: Model) -> str:
    """What the evaluation by the published protocol rests on."""
    parts = [digest(config.paper, config.evaluate, config.split), model.weights]
    if config.evaluate.labels != "capture":
        parts.append(scanner_version(workspace, config))
    parts += [file.path for file in workspace.table("embeddings").files({"model": model.id})]
    return f"{fingerprint(parts):016x}"


def report_version(workspace: Workspace, config: RunConfig, model: Model, period: str | None = None) -> str:
    """What the report of a run rests on: also the evaluation that is there, and what one would rest on now.

    The report of one period shows the last evaluation, whenever that was.
    """
    shown = [_state_of(path) for path in (config.report.pfx2as, config.report.mmdb) if path is not None]
    where = {"run": config.run}
    if period is None:
        shown += [file.path for file in workspace.table("captures").files()]
        shown += [evaluation_version(workspace, config, model)]
    else:
        where["period"] = period
    shown += [file.path for file in workspace.table("campaigns").files(where)]
    for name in (EVALUATION, COMPARISON):
        shown.append(version_of(workspace, run_file(config, name)) or "")
    seeds = workspace.read_json(run_file(config, SEEDS))
    shown.append(json.dumps(seeds, sort_keys=True))
    return f"{fingerprint(digest(config.report, config.cluster), model.weights, shown):016x}"


def _state_of(path: str) -> str:
    """What tells one content of a file from another without reading it."""
    fs, inner = filesystem(path)
    info = fs.get_file_info(inner)
    return f"{info.size} {info.mtime_ns}"


def report_name(period: str | None) -> str:
    """What the report of a run, or of one period of it, is called among the run's files, without ending."""
    return "report" if period is None else f"report-{period}"


def run_file(config: RunConfig, name: str) -> str:
    """Path in the workspace of a result of this run."""
    return f"runs/{config.run}/{name}"


def version_of(workspace: Workspace, path: str) -> str | None:
    """The version that a JSON result of a run was made from, or None when there is none."""
    found = workspace.read_json(path)
    return None if found is None else str(found.get("made_from"))


def config_hash(config: RunConfig) -> str:
    """Hash of everything in the configuration that can change a result."""
    data = {
        name: digest(getattr(config, name))
        for name in RunConfig.model_fields
        if name not in ("run", "tune", "reprocess", "resources")
    }
    return digest(json.dumps(data, sort_keys=True))


def versions() -> dict[str, str]:
    """Versions of everything that results depend on."""
    return {
        "rayscan": rayscan.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }

"""One frozen pydantic model per stage, composed into `RunConfig`.

Settings are merged from the weakest to the strongest: the field defaults, a preset
(`presets/*.yaml`), a file, environment variables `RAYSCAN_<SECTION>__<KEY>`, `--set section.key=value`.
An unknown key is an error that names the nearest valid one, wherever it came from.

Every section has a `digest`: the hash of those of its fields that can change a result. Fields that only say
how the work is done (workers, batch sizes) are marked `how=True` and stay outside it, so that rerunning on
a larger cluster redoes nothing. A field that was added later stays outside it too while it has the value
that leaves everything as it was before (`_since`), so that upgrading redoes nothing. A changed default is
seen, because the value is compared with that neutral one, not with the default.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from rayscan.errors import ConfigError

ENV_PREFIX = "RAYSCAN_"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # becomes part of a path
Tracker = Literal["tensorboard", "mlflow", "wandb"]
Precision = Literal["auto", "float32", "bfloat16"]
Method = Literal[
    "rayscan",
    "port-share",
    "ports-svd",
    "clan",
    "crossmodal",
    "gcn",
    "i-gcn",
    "gcn-gru",
    "i-gcn-gru",
    "darkvec",
    "i-darkvec",
    "dante",
    "ip2vec",
]
Unsure = Literal["dst", "ttl", "size", "tcp_flags", "src_port", "icmp_code"]  # not in every capture
Input = Literal["dst_port", "proto", "gap", Unsure]


def _how(default: Any, description: str, **constraints: Any) -> Any:
    """A field that says how work is done and cannot change a result: left out of digests."""
    return Field(default, description=description, json_schema_extra={"how": True}, **constraints)


def _since(neutral: Any, description: str, **constraints: Any) -> Any:
    """A field of a section that workspaces already know; `neutral`, its first default, changes nothing there.

    Should the default change one day, `neutral` must stay.
    """
    return Field(neutral, description=description, json_schema_extra={"neutral": neutral}, **constraints)


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Strings = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Numbers = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_one_or_many)]


def _without_unit(value: Any) -> Any:
    return value.strip().removesuffix("s") if isinstance(value, str) else value


_CREDENTIALS = re.compile(r"(?<!file)://([^/]*[@:]|.*\?[^/]*=)")
"""A user, a password or a port before the path of a URI; a query. A `?` alone may stand in a pattern."""


def without_credentials(value: str) -> str:
    """The path or URI itself. Raises ConfigError, which does not repeat it, where it may hold credentials."""
    if _CREDENTIALS.search(value):
        raise ConfigError(
            f"a {value.partition('://')[0]}:// URI has more before its path than a name, or a query: "
            "keys and passwords must not stand there, for logs, config.yaml and error messages repeat it. "
            "Give them in the environment, a profile or the machine's role (docs/storage.md)"
        )
    return value


Place = Annotated[str, AfterValidator(without_credentials)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_one_or_many)]


def _prefix(value: str) -> str:
    try:
        return str(ipaddress.IPv4Network(value))
    except ValueError as error:
        raise ValueError(f"is no IPv4 prefix such as 198.18.0.0/15: {error}") from None


Networks = Annotated[tuple[Annotated[str, AfterValidator(_prefix)], ...], BeforeValidator(_one_or_many)]
Seconds = Annotated[int, BeforeValidator(_without_unit), Field(ge=1, le=86_400)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest_data(self) -> dict[str, Any]:
        """The fields that can change a result, as JSON-able data."""
        data = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and (extra.get("how") or extra.get("neutral", ...) == data[name]):
                del data[name]
        return data


class CapturesConfig(Section):
    """What to read, and how to understand it."""

    paths: Places = _how(
        (),
        "Files, folders (read recursively) or s3:// prefixes of captures. In a quoted pattern `*`, `?` and "
        "`[...]` match within a name, `**` any folders; a folder that matches is read whole.",
    )
    format: str = _since(
        "auto",
        "Format of all captures, for files whose content is ambiguous; auto tells each by its content.",
    )
    columns: dict[str, str] = Field(
        {},
        description="Column map for tables (Parquet, CSV): rayscan's name -> the file's name, for example "
        "{src: source_address}. Common names are recognised without it.",
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        None, description="Unit of a numeric time column. Without it, numbers as times are an error."
    )
    time_zone: str | None = Field(
        None,
        description="Zone of times written without one (IANA name, e.g. UTC or Europe/Berlin). "
        "Without it, such times are an error.",
    )
    sensor: str | None = Field(None, description="Name of the telescope, where a capture has none.")
    no_label: Strings = Field(
        ("unknown", "none", "unlabelled", "0"),
        description="Labels that name nobody, in any case: read as no label.",
    )
    earliest: datetime = Field(
        datetime(1990, 1, 1, tzinfo=UTC), description="Flows before this are rejected and counted."
    )
    latest: datetime = Field(
        datetime(2100, 1, 1, tzinfo=UTC), description="Flows from this on are rejected and counted."
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="Exact duplicate rows of one capture: kept (clocks of one second make honest ones), "
        "or dropped and counted as rejects.",
    )
    aggregate: Seconds | None = _since(
        None,
        "Packet captures: packets with equal source, destination, port and protocol within so many seconds "
        "(60s) of the first make one flow. Without it, each packet is a flow.",
    )
    reserved: Literal["reject", "keep"] = Field(
        "reject",
        description="Flows whose source lies in private or otherwise special space (RFC 6890), which cannot "
        "come over the Internet: counted as rejects, or kept.",
        json_schema_extra={"neutral": "keep"},
    )
    telescope: Networks = _since(
        (),
        "The telescope's own prefixes. If given, only flows from outside to inside are kept, the others are "
        "counted as rejects; a flow without a recorded destination is kept.",
    )
    max_ratio: int = _how(
        1000, "Largest expansion of a compressed capture before it is refused as a bomb.", ge=1
    )
    max_gb: float = _how(
        1000.0, "Most decompressed gigabytes of one capture before the rest is refused as a bomb.", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("earliest", "latest"):
            if getattr(self, name).tzinfo is None:
                raise ValueError(f"{name} needs a time zone, for example 2024-01-01T00:00:00Z")
        if self.earliest >= self.latest:
            raise ValueError("earliest must lie before latest")
        return self


class IngestConfig(Section):
    """How flows are laid out. Fixed when a workspace is created."""

    period: Literal["day", "week", "month", "all"] = Field(
        "month", description="The slice of time (UTC) that is one unit of work and is replaced as a whole."
    )
    n_buckets: int = Field(
        16, ge=1, le=65536, description="Buckets by hash of the source; aim at 128 to 512 MB per period."
    )
    addresses: Literal["raw", "cryptopan"] = _since(
        "raw",
        "Store source and destination addresses as they are, or as prefix-preserving pseudonyms "
        "(Crypto-PAn) with the key of RAYSCAN_ANONYMISE_KEY or ingest.key_file.",
    )
    key_file: Place | None = _how(
        None, "File with the key of the pseudonyms: 64 hexadecimal digits or 32 bytes. It is never copied."
    )
    batch_rows: int = _how(500_000, "Rows a task holds in memory at a time.", ge=1)


class SequencesConfig(Section):
    """How flows become sequences."""

    length: int = Field(128, ge=2, le=65536, description="Flows in a full sequence.")
    min_length: int = Field(16, ge=1, description="Fewest flows that still make a sequence.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_length > self.length:
            raise ValueError(f"min_length {self.min_length} exceeds length {self.length}")
        return self


class SplitConfig(Section):
    """Which sources and sequences training never sees."""

    test_sources: float = Field(
        0.2, ge=0, lt=1, description="Share of sources kept whole for the final evaluation."
    )
    validation_sources: float = Field(
        0.1, ge=0, lt=1, description="Share of sources for choices: checkpoint, threshold, sweep."
    )
    unseen_sequences: float = Field(
        0.2, ge=0, lt=1, description="Share of a training source's last sequences of a period, kept back."
    )
    seed: int = Field(
        42, description="Seed of the assignment, which depends on nothing but it and the source."
    )
    group: Literal["source", "network"] = _since(
        "source",
        "What falls on one side as a whole: each source, or each network of 256 addresses (/24), so that "
        "no unseen source has a neighbour in training.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.test_sources + self.validation_sources >= 1:
            raise ValueError("test_sources and validation_sources leave no source to train on")
        return self


class ModelConfig(Section):
    """The encoder."""

    inputs: tuple[Input, ...] = Field(
        ("dst", "dst_port", "proto", "gap"),
        min_length=1,
        description="Columns of a flow the encoder sees. The type of ICMP stands in dst_port.",
    )
    optional: tuple[Unsure, ...] = Field(
        ("src_port", "icmp_code"),
        description="Further inputs, of which training takes those that all of its sequences record; also "
        "ttl, size, tcp_flags.",
        json_schema_extra={"neutral": []},
    )
    d_model: int = Field(128, ge=8, description="Width of the transformer.")
    layers: int = Field(2, ge=1, description="Transformer layers.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide d_model.")
    d_ff: int = Field(256, ge=8, description="Width of the feed-forward layers.")
    d_embedding: int = Field(128, ge=2, description="Dimensions of the embedding.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the residual branches.")
    causal: bool = Field(
        False, description="Attend to earlier flows only, as the paper's code does; else to all."
    )
    attention_scale: Literal["head", "model"] = Field(
        "head", description="Divide logits by sqrt(d_head) or, as the paper's code does, by sqrt(d_model)."
    )
    encoding: Literal["structure", "tables"] = Field(
        "structure",
        description="A flow's address, port and gap as tokens: the host part's bits and those that changed "
        "since the flow before, hashed with the protocol, and waves from microseconds to weeks; or, as the "
        "paper does, a row for each octet and each port and a line.",
        json_schema_extra={"neutral": "tables"},
    )
    norm: Literal["pre", "post"] = Field(
        "pre",
        description="Normalise ahead of each branch of a layer or, as the paper does, after it.",
        json_schema_extra={"neutral": "post"},
    )
    pooling: Literal["moments", "mean"] = Field(
        "moments",
        description="Of a sequence's flows take mean, largest and spread or, as the paper does, the mean.",
        json_schema_extra={"neutral": "mean"},
    )
    counts: int = Field(
        16_384,
        ge=0,
        description="Rows of the hashed table of counted features beside the transformer; 0 for none, as in "
        "the paper.",
        json_schema_extra={"neutral": 0},
    )
    time: Literal["int64", "float32"] = Field(
        "int64",
        description="Gaps from exact microseconds, or from epoch times rounded to float32 first, as the "
        "paper's code does (gaps under two minutes then vanish).",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"heads {self.heads} does not divide d_model {self.d_model}")
        named = (*self.inputs, *self.optional)
        if len(set(named)) != len(named):
            raise ValueError("inputs names a column twice, or one of optional")
        return self

    def settled(self, is_recorded: Callable[[str], bool]) -> Self:
        """The same with those optional inputs that are recorded among the inputs, and no others."""
        more = tuple(filter(is_recorded, self.optional))
        return self.model_copy(update={"inputs": (*self.inputs, *more), "optional": ()})


class TrainConfig(Section):
    """Contrastive training."""

    steps: int = Field(2000, ge=1, description="Optimiser steps.")
    batch_sources: int = Field(
        256, ge=2, description="Sources in the global batch, over all workers; two sequences of each."
    )
    temperature: Numbers = Field(
        (0.15, 0.04),
        min_length=1,
        description="Temperature of NT-Xent. Of several, the mean of the losses is taken: a low one minds "
        "the most similar pairs of different sources, a higher one all of them.",
    )
    negatives: Literal["anchor", "batch"] = Field(
        "batch",
        description="Hold a pair of one source against the pairs of different sources of the whole batch, as "
        "one threshold for all pairs asks for, or, as NT-Xent does, against those of its first member.",
        json_schema_extra={"neutral": "anchor"},
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Sources are drawn with probability ∝ sequences^alpha.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Rate after the warm-up.")
    warmup_steps: int = Field(30, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    decay: Literal["matrices", "all"] = Field(
        "matrices",
        description="What decays: matrices only, or, as the paper's code does, also tables, norms, biases.",
    )
    clip_norm: float | None = Field(1.0, gt=0, description="Largest gradient norm; null for no clipping.")
    seed: int = Field(0, description="Seed of initial weights and of sampling.")
    periods: Strings = Field((), description="Periods to train on; all of the workspace when empty.")
    pool_sequences: int = Field(500_000, ge=4, description="Sequences a worker holds in memory to draw from.")
    pool_steps: int = Field(500, ge=1, description="Steps drawn from one pool before it is refreshed.")
    validate_every: int = Field(100, ge=1, description="Steps between validations.")
    patience: int | None = _since(
        None,
        "End training after so many validations without a better separation; null for all steps.",
        ge=1,
    )
    workers: int = _how(1, "Training processes. The global batch stays the same.", ge=1)
    threads: int = _how(0, "CPU threads of each worker; 0 shares the cores out.", ge=0)
    checkpoint_every: int = _how(100, "Steps between checkpoints.", ge=1)
    max_failures: int = _how(3, "Restarts from the last checkpoint after a lost worker.", ge=0)
    device: Literal["auto", "cpu", "cuda"] = _how(
        "auto",
        "Where to train; auto takes what resources.train_gpus asks for, or of a local Ray a GPU for each "
        "worker if it has so many.",
    )
    precision: Precision = _since(
        "auto",
        "Of the encoder's matrix products: auto is bfloat16 on GPUs and processors that multiply it faster "
        "(AMX), else float32.",
    )
    compile: bool = _since(
        False,
        "Have torch.compile fuse the encoder's layers; on the CPUs that were measured, training was slower.",
    )
    method: Method = _since(
        "rayscan",
        "What learns to embed: rayscan's encoder, or a method of others (`--method` sets it; "
        "docs/methods.md), which takes nothing but seed and periods from this section.",
    )
    start: str | None = _since(
        None,
        "Model of the workspace to go on from, by its id (`train --from` sets it); else random weights.",
        pattern=_NAME,
    )
    trackers: tuple[Tracker, ...] = _how(
        ("tensorboard",),
        "Who is told of every step besides metrics.parquet: tensorboard (beside the model), mlflow, wandb.",
    )


# Budget, data and yardstick are the same for all trials.
_FIXED_IN_SWEEP = {"steps", "periods", "start", "method", "validate_every", "patience"}


class Dimension(Section):
    """One setting of a sweep: exactly one of these."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="One of these values.")
    uniform: tuple[float, float] | None = Field(None, description="A number between these two.")
    loguniform: tuple[float, float] | None = Field(None, description="The same, evenly on a log scale.")
    integer: tuple[int, int] | None = Field(None, description="A whole number from the first to the second.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError(f"takes exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is None and self.values[0] >= self.values[1]:
            raise ValueError("takes the smaller number first")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("loguniform takes numbers above 0")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """The choices, or the two ends."""
        return next(v for v in (self.choice, self.uniform, self.loguniform, self.integer) if v is not None)


class TuneConfig(Section):
    """The sweep of `rayscan tune`: successive halving over settings of `model` and `train`."""

    space: dict[str, Dimension] = Field(
        {},
        description="What to vary, for example {train.learning_rate: {loguniform: [1e-4, 1e-2]}, "
        "model.layers: {choice: [1, 2]}}; also uniform and integer.",
    )
    trials: int = Field(16, ge=2, description="Settings that are tried; the first are the unchanged ones.")
    reduction: int = Field(3, ge=2, description="After each rung one in so many trials goes on.")
    first_steps: int = Field(
        100, ge=1, description="Fewest steps of the first rung; each later one has `reduction` times as many."
    )
    seed: int = Field(0, description="Seed of the settings drawn.")
    minutes: float | None = _how(None, "Stop after so much time; the next run goes on.", gt=0)
    concurrent: int = _how(0, "Most trials at a time; 0 for as many as there are CPUs or GPUs.", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for path, dimension in self.space.items():
            field = _swept_field(path)
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata])  # type: ignore[arg-type]
            for value in dimension.values:
                try:
                    adapter.validate_python(value)
                except ValidationError as error:
                    raise ValueError(f"{path} cannot be {value!r}: {error.errors()[0]['msg']}") from None
        return self


def _swept_field(path: str) -> FieldInfo:
    """The field behind `section.key`, if a sweep can vary it. Raises ValueError."""
    section, _, key = path.partition(".")
    sections: dict[str, type[Section]] = {"model": ModelConfig, "train": TrainConfig}
    fields = {
        f"{name}.{key}": field
        for name, kind in sections.items()
        for key, field in kind.model_fields.items()
        if key not in _FIXED_IN_SWEEP and field.json_schema_extra != {"how": True}
    }
    if path not in fields:
        if section not in sections and path in _all_keys():
            raise ValueError(
                f"{path} cannot be swept: all trials have the same sequences; vary model or train"
            )
        if section in sections and key in sections[section].model_fields:
            raise ValueError(f"{path} cannot be swept: trials would not be comparable")
        raise ValueError(f"unknown setting {path}{_nearest(path, fields)}")
    return fields[path]


class EmbedConfig(Section):
    """Embedding every sequence."""

    batch_tokens: int = _how(4096, "Flows in one forward pass, padding included; a GPU takes more.", ge=1)
    workers: int = _how(1, "Actors that hold the model.", ge=1)
    threads: int = _how(0, "CPU threads of each actor; 0 shares the cores out.", ge=0)
    device: Literal["auto", "cpu", "cuda"] = _how(
        "auto", "Where to embed; auto as in train.device, with resources.embed_gpus."
    )
    precision: Precision = _how(
        "auto",
        "Of the encoder's matrix products, as train.precision; what is embedded already stays. Similarities "
        "differ by some 2e-4.",
    )
    compile: bool = _how(
        False,
        "Have torch.compile fuse the encoder's layers: 1.2 to 1.4 times as fast on a CPU, after a minute in "
        "each actor, and needs a C++ compiler there.",
    )
    model: str | None = _since(
        None,
        "Id of a model of the workspace to use (`--model` sets it); else the one these settings train.",
        pattern=_NAME,
    )


class ClusterConfig(Section):
    """Correlation clustering."""

    threshold: float | Literal["auto"] = Field(
        "auto",
        description="Similarity at which joining and cutting a pair cost the same, or auto: calibrated on "
        "same-source against different-source pairs of validation sources.",
    )
    prior: float = Field(
        0.5, gt=0, lt=1, description="For auto: assumed share of same-source pairs among all pairs."
    )
    block_sequences: int = Field(
        65_536, ge=2, description="Sequences of one task; it holds their vectors and little else."
    )
    max_rounds: int = Field(20, ge=0, description="Most rounds of moves over all blocks after merging.")
    least_gain: float = _since(
        1e-5,
        "Rounds end with one that raises the objective by less than this share; 0 goes on until no sequence "
        "gains by moving.",
        ge=0,
    )
    seed: int = Field(0, description="Seed of the order in which sequences meet.")
    device: Literal["auto", "cpu", "cuda"] = _how(
        "auto",
        "Where tasks compare sequences with clusters; auto takes a GPU if resources.cluster_gpus has one.",
    )


class CampaignsConfig(Section):
    """Following clusters from period to period."""

    remember: int = Field(
        3, ge=1, description="Periods after which a campaign without a cluster is forgotten."
    )


class ScannersConfig(Section):
    """Known scanners, from the lists that `rayscan scanners import` has read."""

    tolerance_days: int = Field(
        183,
        ge=0,
        le=1_000_000,
        description="Days outside the dates of a list entry on which it still counts. Lists age fast: with "
        "no limit, half of the matches of 2023 traffic were addresses that scanned years later.",
    )


class EvaluateConfig(Section):
    """How far the result can be trusted."""

    max_sequences_per_source: int = Field(
        20, ge=2, description="Sequences taken of one source, so that none rules the figures."
    )
    max_sequences: int = Field(20_000, ge=10, description="Sequences compared with each other, per part.")
    labels: Literal["auto", "capture", "scanners"] = _since(
        "auto",
        "What figures by label are of: the labels of the captures, the organisations that scanner lists "
        "name, or auto: the captures' labels if they have any, else the lists'.",
    )
    min_label_sources: int = Field(5, ge=2, description="Fewest sources of a label that is scored.")
    bootstrap: int = Field(200, ge=0, description="Resamples of sources for intervals; 0 for none.")
    sweep_sequences: int = _since(
        2_000,
        "Validation sequences that are clustered at each of 100 thresholds, to show what another one would "
        "have done; 0 for no sweep.",
        ge=0,
    )
    seed: int = Field(0, description="Seed of the sampling.")


class PaperConfig(Section):
    """The published protocol (arXiv 2606.04733), `rayscan evaluate --protocol paper`."""

    anchors: int = Field(
        50_000, ge=10, description="Sequences of which similarities are compared, per part and kind."
    )
    clustered: int = Field(
        10_000, ge=2, description="Sequences clustered at each threshold, half of them labelled, per part."
    )
    solver: Literal["greedy", "moves"] = Field(
        "greedy",
        description="Clusters by greedy additive edge contraction, as published, or by rayscan's own search, "
        "which finds better ones in less time.",
    )
    tsne: int = Field(5_000, ge=0, description="Sequences placed by t-SNE, per part; 0 for none.")
    seed: int = Field(42, description="Seed of anchors and of t-SNE.")


class ReportConfig(Section):
    """The HTML report."""

    title: str = Field("rayscan report", description="Heading of the page.")
    show_sources: bool = Field(
        True,
        description="Write addresses and networks of sources and destinations into the report, and those of "
        "campaigns to the terminal.",
    )
    max_clusters: int = Field(  # the map has 16 bits for them
        5_000, ge=1, le=50_000, description="Largest clusters that get a row, over all periods."
    )
    max_points: int = Field(50_000, ge=100, description="Sequences shown on the map.")
    pfx2as: Place | None = _since(
        None, "File of prefixes and AS numbers (CAIDA's pfx2as): the report then names those of the sources."
    )
    mmdb: Place | None = _since(
        None,
        "MaxMind database (.mmdb) of countries or AS numbers, on every machine at this path: the report then "
        "names those of the sources. Needs the extra `mmdb`.",
    )


class ReprocessConfig(Section):
    """What `rayscan reprocess` does about a model that no longer fits the traffic."""

    drift: float = _how(
        0.05,
        "Separation that the model may lose on sources it has not seen, from its own data to new periods, "
        "before that counts as drift.",
        gt=0,
        lt=1,
    )
    min_sources: int = _how(
        50, "Fewest unseen sources with two sequences on which drift is judged; fewer say too little.", ge=2
    )
    on_drift: Literal["report", "train"] = _how(
        "report",
        "After drift: say so, or train on from the model with the new periods, switch to what comes out, and "
        "embed and cluster all periods anew with it.",
    )
    train_steps: int = _how(300, "Steps of that training.", ge=1)
    learning_rate: float = _how(2e-4, "Peak learning rate of that training.", gt=0)


class ResourcesConfig(Section):
    """What Ray is told; nothing here changes a result."""

    local_cpus: int = _how(0, "Logical CPUs of a local Ray; 0 for the cores, but at least 4.", ge=0)
    object_store_mb: int = _how(512, "Shared memory of a local Ray.", ge=80)
    in_flight: int = _how(
        64,
        "On a cluster: so many tasks of a stage are queued or running at the least. It starts machines for "
        "tasks that wait: more in flight, more machines at once.",
        ge=2,
    )
    ingest_cpus: float = _how(1, "CPUs of one ingest task.", gt=0)
    ingest_memory_mb: int = _how(0, "Memory reserved for one ingest task; 0 reserves none.", ge=0)
    sequence_cpus: float = _how(1, "CPUs of one sequence task.", gt=0)
    sequence_memory_mb: int = _how(0, "Memory reserved for one sequence task; 0 reserves none.", ge=0)
    train_cpus: float = _how(1, "CPUs of one training worker.", gt=0)
    train_gpus: float = _how(0, "GPUs of one training worker.", ge=0)
    train_memory_mb: int = _how(0, "Memory reserved for one training worker; 0 reserves none.", ge=0)
    embed_cpus: float = _how(1, "CPUs of one embedding actor.", gt=0)
    embed_gpus: float = _how(0, "GPUs of one embedding actor.", ge=0)
    embed_memory_mb: int = _how(0, "Memory reserved for one embedding actor; 0 reserves none.", ge=0)
    cluster_cpus: float = _how(1, "CPUs of one clustering task.", gt=0)
    cluster_gpus: float = _how(0, "GPUs of one clustering task.", ge=0)
    cluster_memory_mb: int = _how(0, "Memory reserved for one clustering task; 0 reserves none.", ge=0)


class RunConfig(Section):
    """Everything that determines a run."""

    run: str = Field(
        "main",
        pattern=_NAME,
        description="Name under which clusters, evaluation and report are kept; another name keeps both.",
    )
    captures: CapturesConfig = CapturesConfig()
    ingest: IngestConfig = IngestConfig()
    sequences: SequencesConfig = SequencesConfig()
    split: SplitConfig = SplitConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    scanners: ScannersConfig = ScannersConfig()
    campaigns: CampaignsConfig = CampaignsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    paper: PaperConfig = PaperConfig()
    report: ReportConfig = ReportConfig()
    reprocess: ReprocessConfig = ReprocessConfig()
    resources: ResourcesConfig = ResourcesConfig()


def digest(*parts: Section | str | int | float | None) -> str:
    """Hash (16 hex digits) of sections and plain values, in order; equal on every machine."""
    data = [p.digest_data() if isinstance(p, Section) else p for p in parts]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    folder = resources.files("rayscan") / "presets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(
    preset: str = "default",
    file: str | Path | None = None,
    sets: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
) -> RunConfig:
    """The merged configuration.

    `sets` are `section.key=value` with the value in YAML. `env` defaults to the process's environment.
    Raises ConfigError, naming where the offending setting came from.
    """
    layers = [(f"preset {preset}", _preset(preset))]
    if file is not None:
        layers.append((str(file), _read_yaml(Path(file))))
    layers.append(("environment", _from_env(os.environ if env is None else env)))
    layers.append(("--set", _from_sets(sets)))
    merged: dict[str, Any] = {}
    for origin, layer in layers:
        _check_keys(layer, RunConfig, origin)
        merged = _merge(merged, layer)
    return _validated(merged)


def from_yaml(text: str, origin: str) -> RunConfig:
    """The configuration that `as_yaml` wrote. `origin` is named in errors."""
    data = yaml.safe_load(text)
    _check_keys(data, RunConfig, origin)
    return _validated(data)


def _validated(data: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}{_nearest(name, preset_names())}")
    text = (resources.files("rayscan") / "presets" / f"{name}.yaml").read_text("utf-8")
    return dict(yaml.safe_load(text) or {})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold sections (captures:, train:, ...), not a {type(data).__name__}")
    return data


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    """RAYSCAN_TRAIN__STEPS=5 -> {"train": {"steps": 5}}. Variables without `__` are not settings."""
    layer: dict[str, Any] = {}
    for name in sorted(env):
        section, sep, key = name.removeprefix(ENV_PREFIX).partition("__")
        if name.startswith(ENV_PREFIX) and sep:
            value = _parse_value(env[name], name)
            layer.setdefault(section.lower(), {})[key.lower()] = value
    return layer


def _from_sets(sets: Iterable[str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for item in sets:
        path, sep, text = item.partition("=")
        if not sep or not path:
            raise ConfigError(f"--set takes section.key=value, not {item!r}")
        node = layer
        *sections, key = path.strip().split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item!r} goes into a value that another --set has given")
        node[key] = _parse_value(text, f"--set {path}")
    return layer


def _parse_value(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {text!r} is not a YAML value: {error}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _check_keys(layer: dict[str, Any], model: type[Section], origin: str, prefix: str = "") -> None:
    for key, value in layer.items():
        field = model.model_fields.get(str(key))
        if field is None:
            near = _nearest(prefix + str(key), _all_keys()) if prefix else _nearest_top(str(key))
            raise ConfigError(f"{origin}: unknown setting {prefix}{key}{near}")
        sub = field.annotation
        if isinstance(sub, type) and issubclass(sub, Section):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: {prefix}{key} is a section; set {prefix}{key}.<key>")
            _check_keys(value, sub, origin, f"{prefix}{key}.")


def _all_keys() -> list[str]:
    keys = []
    for name, field in RunConfig.model_fields.items():
        sub = field.annotation
        if isinstance(sub, type) and issubclass(sub, Section):
            keys += [f"{name}.{key}" for key in sub.model_fields]
        else:
            keys.append(name)
    return keys


def _nearest_top(key: str) -> str:
    """For a key given without its section: the section of that name, or the keys called so."""
    same = [k for k in _all_keys() if k.endswith(f".{key}")]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    return _nearest(key, [*RunConfig.model_fields, *_all_keys()])


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; valid are {', '.join(valid)}" if len(valid) <= 12 else "; see `rayscan config schema`"


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        got = f" (got {item['input']!r})"
        if isinstance(item["input"], dict) or _CREDENTIALS.search(got):
            got = ""
        lines.append(f"{where or 'config'}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(lines)


def as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)

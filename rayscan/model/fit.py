"""Contrastive training: batches in, a trained encoder and its measurements out.

The loop knows nothing of files, storage or cluster. Under several processes it expects the default process
group to exist and does what one process would with the same global batch: same loss, same gradients.

Both views of a batch go through one forward pass. Batches (see `sampling`) and dropout of step k depend on
nothing but the seed, k and the rank, so that a run resumed from a `TrainState` goes on exactly as the
undisturbed one. Losses are read back from the device every `READ_BACK` steps, for reading makes a GPU wait.

The state is tensors plus a few numbers, written as safetensors: no pickle, which would run what it reads.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rayscan.config import ModelConfig, Precision, TrainConfig, digest
from rayscan.errors import DataError, ModelError
from rayscan.model.embed import embed, to_device
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences
from rayscan.model.loss import global_nt_xent
from rayscan.model.precision import autocast
from rayscan.model.sampling import Batch, PairSampler
from rayscan.model.schedule import warmed_cosine

READ_BACK = 10
"""Steps between looks at the loss."""
VALIDATION_TOKENS = 4096  # activations that stay in cache: a quarter faster on a CPU than 16,384

Metrics = dict[str, float]
"""Of one step: step (from 1), loss, learning_rate, gradient_norm, sequences_per_s; maybe separation."""


@dataclass(frozen=True)
class TrainState:
    """All that training needs to go on after `step` steps."""

    step: int
    settings: str  # digest of the settings it was made with
    tensors: dict[str, Tensor]  # model.*, best.*, exp_avg.*, exp_avg_sq.*: by parameter name, on the CPU
    best_step: int = 0
    best_separation: float = -1.0  # -1 for not validated yet

    def to_bytes(self) -> bytes:
        numbers = {k: v for k, v in vars(self).items() if k != "tensors"}
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        return bytes(save(tensors, metadata={"state": json.dumps(numbers)}))

    @classmethod
    def starting_from(
        cls, weights: Mapping[str, Tensor], model: ModelConfig, train: TrainConfig
    ) -> TrainState:
        """Step 0 with the weights of a trained encoder and an optimiser that has seen nothing."""
        tensors = {f"model.{name}": x for name, x in weights.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors |= {f"{moment}.{name}": torch.zeros_like(x) for name, x in weights.items()}
        return cls(0, digest(model, train), tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainState:
        """Raises ModelError if the bytes are not a whole checkpoint."""
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            numbers = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["state"])
            return cls(tensors=tensors, **numbers)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the checkpoint is damaged ({error}); train with --fresh to begin from the start"
            ) from None


@dataclass(frozen=True)
class FitResult:
    """The encoder with the best separation seen (the last weights if nothing was validated), on the CPU."""

    encoder: Encoder
    metrics: list[Metrics]  # of the steps done in this call
    best_step: int
    separation: float | None


def fit(
    model: ModelConfig,
    train: TrainConfig,
    sampler: PairSampler,
    *,
    device: torch.device | str = "cpu",
    start_state: TrainState | None = None,
    until: int | None = None,
    validation: Sequences | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    on_checkpoint: Callable[[TrainState | None, Metrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train an encoder for `train.steps` steps on the batches of `sampler`.

    `start_state` continues a run of the same settings (else ModelError). `until` ends it after so many steps,
    as if they were the last, but at the learning rates of the whole run. `validation` holds sequences of
    sources that training does not see: every `validate_every` steps and after the last, process 0 measures
    `separation` on it; after `patience` of these without a better one it ends. `on_step` gets the metrics of
    every step in order, up to READ_BACK steps late. `on_checkpoint` is called in every process each
    `checkpoint_every` steps and after the last, with the metrics of that step and, in process 0, the state.
    `stop` is asked after steps, in every process after the
    same ones, and must answer alike in all of them: True ends it with a checkpoint. Under several processes
    the default process group exists already. Raises DataError or ModelError if the loss is not finite. Random
    state outside is left as it was.
    """
    device = torch.device(device)
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_step_seed(train, -1, 0))
        run = _Run.begin(model, train, sampler, device, start_state)
        end = train.steps if until is None else min(until, train.steps)
        end = run.step if run.is_past_its_best() else end
        batches = sampler.batches(model, run.step, end)
        try:
            for batch in batches:
                run.advance(batch)
                last = run.step == end
                due = [
                    last or run.step % every == 0 for every in (train.validate_every, train.checkpoint_every)
                ]
                reading = any(due) or run.step % READ_BACK == 0
                # A GPU would have to wait for the question; a CPU's steps are long enough to ask after each.
                stopped = stop is not None and (reading or device.type == "cpu") and not last and stop()
                if reading or stopped:
                    run.read_back(validation if due[0] else None, on_step)
                ended = due[0] and run.is_past_its_best()
                if (due[1] or stopped or ended) and on_checkpoint is not None:
                    on_checkpoint(run.state() if sampler.rank == 0 else None, run.metrics[-1])
                if stopped or ended:
                    break
        finally:
            batches.close()
    return run.result()


@dataclass
class _Pending:
    """A step whose loss has not been read back."""

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    batch: Batch


@dataclass
class _Run:
    """What changes while training."""

    train: TrainConfig
    settings: str
    device: torch.device
    rank: int
    encoder: Encoder
    forward: nn.Module  # the encoder, or what averages its gradients over processes
    optimizer: torch.optim.AdamW
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_separation: float = -1.0
    pending: list[_Pending] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(
        cls,
        model: ModelConfig,
        train: TrainConfig,
        sampler: PairSampler,
        device: torch.device,
        state: TrainState | None,
    ) -> _Run:
        encoder = Encoder(model).to(device)
        if train.compile:
            encoder.compile_layers()
        settings = digest(model, train)
        if state is not None and state.settings != settings:
            raise ModelError(
                "the checkpoint was made with other settings of model or train; train with --fresh to begin "
                "from the start, or go back to its settings"
            )
        if state is not None:
            _load(encoder, _part(state.tensors, "model"))
        optimizer = torch.optim.AdamW(parameter_groups(encoder, train), fused=True)
        forward: nn.Module = encoder
        if sampler.world > 1:
            # Buffers are constant; gradients are all there in every step.
            with warnings.catch_warnings():  # the argument has another name since torch 2.13 only
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                forward = nn.parallel.DistributedDataParallel(
                    encoder, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        run = cls(train, settings, device, sampler.rank, encoder, forward, optimizer)
        if state is not None:
            run.restore(state)
        return run

    def advance(self, batch: Batch) -> None:
        """One optimiser step."""
        train = self.train
        rate = learning_rate(self.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_step_seed(train, self.step, self.rank))
        self.forward.train()
        with autocast(self.device, train.precision):
            vectors = self.forward(to_device(batch.tensors, self.device))
        source = batch.source.to(self.device, non_blocking=True)
        loss = global_nt_xent(vectors, source, train.temperature, batch.sizes, train.negatives)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = math.inf if train.clip_norm is None else train.clip_norm
        norm = nn.utils.clip_grad_norm_(self.encoder.parameters(), limit)
        self.optimizer.step()
        self.step += 1
        self.pending.append(_Pending(self.step, loss.detach(), norm, rate, batch))

    def read_back(self, validation: Sequences | None, on_step: Callable[[Metrics], None] | None) -> None:
        """Turn the pending steps into metrics, check them, validate if asked to."""
        losses = torch.stack([p.loss for p in self.pending])
        if len(self.pending[0].batch.sizes) > 1:
            dist.all_reduce(losses)
            losses /= len(self.pending[0].batch.sizes)
        norms = torch.stack([p.gradient_norm for p in self.pending])
        values = torch.stack([losses, norms]).tolist()
        elapsed = time.perf_counter() - self.since
        speed = sum(sum(p.batch.sizes) for p in self.pending) / elapsed
        for pending, loss, norm in zip(self.pending, *values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self.not_finite(pending, loss, norm)
            self.metrics.append(
                {
                    "step": pending.step,
                    "loss": loss,
                    "learning_rate": pending.learning_rate,
                    "gradient_norm": norm,
                    "sequences_per_s": speed,
                }
            )
        if validation is not None and self.rank == 0:
            self.validate(validation)
        if on_step is not None:
            for metrics in self.metrics[-len(self.pending) :]:
                on_step(metrics)
        self.pending.clear()
        self.since = time.perf_counter()

    def validate(self, validation: Sequences) -> None:
        """Measure separation; keep the weights if there were none better."""
        value = separation(self.encoder, validation, self.device, self.train.precision)
        self.metrics[-1]["separation"] = value
        if value > self.best_separation:
            self.best = {name: x.detach().cpu().clone() for name, x in self.encoder.state_dict().items()}
            self.best_step, self.best_separation = self.step, value

    def is_past_its_best(self) -> bool:
        """Whether separation has not risen for `patience` validations; alike in all processes."""
        patience = self.train.patience
        if patience is None:
            return False
        waited = self.step - self.best_step >= patience * self.train.validate_every
        waited = waited and self.best_separation >= 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor([int(waited)], device=self.device)
            dist.broadcast(flag, 0)  # process 0 alone has validated
            waited = bool(flag.item())
        return waited

    def not_finite(self, pending: _Pending, loss: float, norm: float) -> DataError | ModelError:
        """What went wrong, as far as it can be told."""
        where = f"step {pending.step}: loss {loss}, gradient norm {norm}"
        inputs = [k for k, x in pending.batch.tensors.items() if not bool(torch.isfinite(x).all())]
        if inputs:
            return DataError(
                f"{where}: inputs that are not finite: {', '.join(inputs)}; check the captures' values"
            )
        broken = [k for k, x in self.encoder.named_parameters() if not bool(torch.isfinite(x).all())]
        return ModelError(
            f"{where}, learning rate {pending.learning_rate:.2g}: training diverged (the inputs are finite; "
            f"weights that are not: {len(broken)}, first {broken[:1]}); lower train.learning_rate, set "
            "train.clip_norm or raise train.warmup_steps"
        )

    def state(self) -> TrainState:
        """A copy of everything, on the CPU."""
        tensors = {f"model.{name}": x for name, x in self.encoder.state_dict().items()}
        tensors |= {f"best.{name}": x for name, x in self.best.items()}
        for name, parameter in self.encoder.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        copies = {name: x.detach().cpu().clone() for name, x in tensors.items()}
        return TrainState(self.step, self.settings, copies, self.best_step, self.best_separation)

    def restore(self, state: TrainState) -> None:
        """Take over the optimiser's moments and what was best. The weights are in place already."""
        self.step, self.best = state.step, _part(state.tensors, "best")
        self.best_step, self.best_separation = state.best_step, state.best_separation
        for name, parameter in self.encoder.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=self.device),
                "exp_avg": state.tensors[f"exp_avg.{name}"].to(self.device),
                "exp_avg_sq": state.tensors[f"exp_avg_sq.{name}"].to(self.device),
            }

    def result(self) -> FitResult:
        encoder = self.encoder.cpu().eval()
        if self.best:
            encoder.load_state_dict(self.best)
            return FitResult(encoder, self.metrics, self.best_step, self.best_separation)
        return FitResult(encoder, self.metrics, self.step, None)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up to the peak, then constant or half a cosine down to 0."""
    if train.schedule == "constant" and step >= train.warmup_steps:
        return train.learning_rate
    return warmed_cosine(step, train.steps, train.warmup_steps, train.learning_rate)


def parameter_groups(encoder: Encoder, train: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices of linear maps decay, tables, norms and biases do not.

    Decay pulls a table's row towards zero in every step, seen or not, and so erases rare ports. The published
    code decays everything: train.decay = "all".
    """
    linear = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Linear)}
    every = train.decay == "all"
    decaying = [p for p in encoder.parameters() if every or id(p) in linear]
    others = [p for p in encoder.parameters() if not (every or id(p) in linear)]
    groups = [
        {"params": decaying, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def separation(
    encoder: Encoder, sequences: Sequences, device: torch.device | str, precision: Precision = "auto"
) -> float:
    """Probability that two sequences of one source are more alike than two of different sources (AUROC)."""
    vectors = embed(encoder, sequences, VALIDATION_TOKENS, device, precision)
    i, j = np.triu_indices(len(sequences), 1)
    similarity = (vectors @ vectors.T)[i, j]
    same = sequences.src[i] == sequences.src[j]
    return auroc(similarity[same], similarity[~same])


def auroc(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs, exact. Raises DataError if either is empty."""
    if not (len(positive) and len(negative)):
        raise DataError(
            "separation needs pairs of one source and of different sources; there are none of one kind"
        )
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / 2 / len(positive) / len(negative))


def _load(encoder: Encoder, weights: Mapping[str, Tensor]) -> None:
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"the checkpoint is of another architecture ({' '.join(str(error).split())[:200]}); train with "
            "--fresh to begin from the start"
        ) from None


def _step_seed(train: TrainConfig, step: int, rank: int) -> int:
    """Seed of everything torch draws in a step; step -1 is the initial weights."""
    return int(
        np.random.SeedSequence([train.seed % 2**63, step + 1, rank]).generate_state(1, np.uint64)[0] >> 1
    )


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}

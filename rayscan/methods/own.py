"""rayscan's own encoder as one method among others: trained in one process on sequences in memory.

The loop, the batches and the choice of the best step are those of `rayscan train` (`model.fit`,
`model.sampling`), which reads files and spreads over machines. Here nothing but the method differs from the
others, so that times and memory compare too.
"""

from __future__ import annotations

import pyarrow as pa

from rayscan.config import ModelConfig, SplitConfig, TrainConfig
from rayscan.methods.method import Arrays, Embedded, Facts
from rayscan.model.embed import embed
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences
from rayscan.model.fit import VALIDATION_TOKENS
from rayscan.model.fit import fit as train_encoder
from rayscan.model.sampling import PairSampler, validation_sample

NAME = "rayscan"


class Own:
    def __init__(self, encoder: Encoder, facts: Facts) -> None:
        self.encoder, self.facts = encoder, facts

    @property
    def arrays(self) -> Arrays:
        return {name: value.numpy() for name, value in self.encoder.state_dict().items()}

    def embed(self, sequences: pa.Table) -> Embedded:
        rows = Sequences.from_table(sequences, self.encoder.config.inputs)
        return Embedded.of(embed(self.encoder, rows, VALIDATION_TOKENS))


def fit(sequences: pa.Table, split: SplitConfig, model: ModelConfig, train: TrainConfig) -> Own:
    """Raises DataError if no two training sources have two sequences."""
    rows = Sequences.from_table(sequences, model.inputs)
    sampler = PairSampler((0,), lambda _: rows, split, train)
    validation = validation_sample((0,), lambda _: rows, split)
    found = train_encoder(model, train, sampler, validation=validation)
    settings = {part: value.model_dump(mode="json") for part, value in (("model", model), ("train", train))}
    facts = {"name": NAME, "settings": settings, "best_step": found.best_step, "separation": found.separation}
    return Own(found.encoder, facts)

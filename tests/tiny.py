"""Settings with which the whole pipeline takes seconds: two buckets, twelve steps of one narrow layer, no
sweep over thresholds.

Of a setting that is given twice, the last value counts: what a test needs otherwise follows these. And how to
sort the tables that come out, to compare them.
"""

TINY = (
    "ingest.n_buckets=2", "train.steps=12", "train.batch_sources=32", "train.validate_every=6",
    "train.threads=1", "model.layers=1", "model.d_model=32", "model.d_ff=32", "model.heads=2",
    "evaluate.sweep_sequences=0",
)  # fmt: skip

KEYS = {
    "flows": ["capture", "ts", "src", "dst", "dst_port", "src_port", "ttl", "size"],
    "sequences": ["period", "sequence_id"],
    "embeddings": ["period", "sequence_id"],
    "clusters": ["period", "sequence_id"],
    "campaigns": ["period", "campaign"],
    "captures": ["path"],
    "rejects": ["path", "reason"],
}

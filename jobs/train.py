"""Train the encoder on the sequences that are there, as a Ray job; a killed one goes on from its checkpoint.

\b
  ray job submit --working-dir . -- python jobs/train.py --config site.yaml --workspace s3://bucket/ws
"""

from __future__ import annotations

from rayscan.cli.job import job
from rayscan.config import RunConfig
from rayscan.pipeline import Run
from rayscan.tables import Workspace


@job
def main(workspace: Workspace, config: RunConfig) -> int:
    return Run(workspace, config).execute(("train",)).exit_code


if __name__ == "__main__":
    main()

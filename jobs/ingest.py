"""Captures to sequences, as a Ray job: what is new or has changed is read, and its sequences are built.

\b
  ray job submit --working-dir . -- python jobs/ingest.py --config site.yaml --workspace s3://bucket/ws
"""

from __future__ import annotations

from rayscan.cli.job import job
from rayscan.config import RunConfig
from rayscan.pipeline import Run
from rayscan.tables import Workspace


@job
def main(workspace: Workspace, config: RunConfig) -> int:
    return Run(workspace, config).execute(("ingest", "sequences")).exit_code


if __name__ == "__main__":
    main()

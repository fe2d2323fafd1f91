"""Sequences to campaigns and report with the trained model, as a Ray job.

\b
  ray job submit --working-dir . -- python jobs/cluster.py --config site.yaml --workspace s3://bucket/ws
"""

from __future__ import annotations

from rayscan.cli.job import job
from rayscan.config import RunConfig
from rayscan.pipeline import Run
from rayscan.tables import Workspace


@job
def main(workspace: Workspace, config: RunConfig) -> int:
    stages = ("embed", "cluster", "campaigns", "evaluate", "report")
    return Run(workspace, config).execute(stages).exit_code


if __name__ == "__main__":
    main()

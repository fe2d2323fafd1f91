"""Try settings and write down the best (section `tune`), as a Ray job; a killed one goes on where it was.

\b
  ray job submit --working-dir . -- python jobs/sweep.py --config sweep.yaml --workspace s3://bucket/ws
"""

from __future__ import annotations

from rayscan.cli.job import job
from rayscan.config import RunConfig
from rayscan.pipeline import tune
from rayscan.progress import say
from rayscan.tables import Workspace


@job
def main(workspace: Workspace, config: RunConfig) -> int:
    code, facts = tune(workspace, config)
    say(f"the best of {facts['trials']} trials, for `jobs/train.py --config`: {facts['config']}")
    return code


if __name__ == "__main__":
    main()

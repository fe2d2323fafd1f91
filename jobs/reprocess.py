"""Take in new and changed captures, redo what they touch and say what changed, as a Ray job for cron.

\b
  ray job submit --working-dir . -- python jobs/reprocess.py --config site.yaml --workspace s3://bucket/ws
"""

from __future__ import annotations

from datetime import datetime

from rayscan.cli.job import job
from rayscan.cli.reprocess import since_option, until_option
from rayscan.config import RunConfig
from rayscan.pipeline import Run
from rayscan.planning import REPROCESS, Window
from rayscan.tables import Workspace


@job
@since_option
@until_option
def main(
    workspace: Workspace, config: RunConfig, since: datetime | None = None, until: datetime | None = None
) -> int:
    return Run(workspace, config, window=Window(since, until)).execute(REPROCESS).exit_code


if __name__ == "__main__":
    main()

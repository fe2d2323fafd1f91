"""Commits of a stage: what many tasks wrote becomes visible period by period.

A period is committed as soon as its last unit is finished, in one commit: readers see a period's old rows or
its new ones, and a killed run has done the periods that it came to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from rayscan.planning import Unit
from rayscan.tables import CommitInfo, File, Workspace


class PeriodCommits:
    """Collects what was written for the units that are due, and commits each period when it is whole.

    The table's version is taken at the start: if another run changes one of these units meanwhile, `add`
    raises CommitConflict.
    """

    def __init__(self, workspace: Workspace, table: str, due: Iterable[Unit], info: CommitInfo) -> None:
        self.table, self.info = workspace.table(table), info
        self.version = self.table.version()
        self.missing = Counter(unit.key["period"] for unit in due)
        self.finished: dict[str, list[tuple[Unit, list[File]]]] = defaultdict(list)

    def add(self, unit: Unit, files: Iterable[File | None]) -> None:
        """Take what a unit's task wrote; None stands for a task that had nothing to write."""
        period = unit.key["period"]
        self.finished[period].append((unit, [file for file in files if file is not None]))
        self.missing[period] -= 1
        if self.missing[period] == 0:
            self._commit(self.finished.pop(period))

    def _commit(self, finished: list[tuple[Unit, list[File]]]) -> None:
        self.table.replace(
            [unit.key for unit, _ in finished],
            [file for _, files in finished for file in files],
            {unit.name: unit.made_from for unit, _ in finished},
            self.info,
            self.version,
        )

"""Where sources lie, by the files that `report.pfx2as` and `report.mmdb` name. Needs no Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.captures.origins import SYSTEMS, AsNumbers, MaxMind
from rayscan.config import RunConfig
from rayscan.errors import ConfigError
from rayscan.stages.lists import HIDDEN, read_whole
from rayscan.tables import Workspace

NamesOf = Callable[[NDArray[np.int64]], pa.Array]
"""A name, or null, for each of many addresses."""


@dataclass(frozen=True)
class Places:
    """The files, as far as they can travel: a MaxMind database is opened by each process that asks it."""

    systems: AsNumbers | None
    mmdb: str | None

    def namers(self) -> dict[str, NamesOf]:
        """What names addresses, by the title of the names."""
        found: dict[str, NamesOf] = {}
        if self.mmdb is not None:
            database = MaxMind(self.mmdb)
            found[database.title] = database
        if self.systems is not None:
            found[SYSTEMS] = self.systems
        return found


def places(workspace: Workspace, config: RunConfig) -> Places:
    """What the settings name. Raises ConfigError or FormatError where it cannot be used."""
    given = config.report
    if (given.pfx2as is not None or given.mmdb is not None) and workspace.addresses != "raw":
        raise ConfigError(f"report.pfx2as and report.mmdb: {HIDDEN}")
    systems = None if given.pfx2as is None else AsNumbers(read_whole(given.pfx2as), given.pfx2as)
    found = Places(systems, given.mmdb)
    found.namers()
    return found

"""Every error that rayscan raises on purpose.

    RayscanError
    ├── ConfigError       a setting is unknown, out of range or contradicts another
    ├── FormatError       a capture cannot be read: path, offset, reason
    ├── SchemaError       a table or file lacks a column, or has one of the wrong type
    ├── WorkspaceError    the workspace is missing, unwritable or of a newer version
    │   └── Gone          a file or an earlier version of a table is not there any more
    ├── CommitConflict    another run has replaced the same key meanwhile
    ├── TaskDied          the process of a task died, time after time
    ├── LeaseHeld         another run is at work on the same things
    ├── DataError         the data cannot carry the computation (too few sources, not finite, ...)
    └── ModelError        a model artefact is damaged or does not fit the flows

A message says what is wrong, where, and what to do about it. The command line prints it alone,
without a traceback, and exits 1 (ConfigError 2, LeaseHeld 4); everything else is a bug and shows its trace.
"""

from __future__ import annotations

import os
import re

STOPPED = 143
"""Exit code after SIGTERM, as shells count: 128 and the signal's number."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RayscanError(Exception):
    """Base of all expected errors; `str(error)` is meant for the user."""

    exit_code = 1


class ConfigError(RayscanError):
    exit_code = 2


class FormatError(RayscanError):
    """A capture that cannot be read, wholly or from some offset on."""

    def __init__(self, path: str, reason: str, offset: int | None = None) -> None:
        self.path, self.reason, self.offset = path, reason, offset
        super().__init__(str(self))

    def __str__(self) -> str:
        where = self.path if self.offset is None else f"{self.path} at {self.offset}"
        return f"{where}: {self.reason}"

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, str, int | None]]:
        return type(self), (self.path, self.reason, self.offset)


class SchemaError(RayscanError):
    pass


class WorkspaceError(RayscanError):
    pass


class Gone(WorkspaceError):
    pass


class CommitConflict(RayscanError):
    pass


class LeaseHeld(RayscanError):
    exit_code = 4  # nothing to do here


class TaskDied(RayscanError):
    pass


class DataError(RayscanError):
    pass


class ModelError(RayscanError):
    pass


def why(error: OSError) -> str:
    """The system's own words for its error where it has any: Arrow's message repeats the path."""
    return os.strerror(error.errno) if error.errno else in_short(error)


def in_short(error: BaseException) -> str:
    """What a library says, on one line of a bounded length, without the colours of a terminal."""
    return " ".join(_COLOUR.sub("", str(error)).split())[:500]

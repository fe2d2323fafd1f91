"""Which flows of a capture come in, and under which addresses: the same for every capture of a workspace.

The key of the pseudonyms goes nowhere: each process reads it for itself from its environment or from a file,
and no task, table, log or report carries it. The workspace keeps a salted hash of it, so that a second key,
which would give every address a second pseudonym, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rayscan.captures.anonymise import Pseudonyms, check_value, is_key, key_of
from rayscan.captures.columns import Batch
from rayscan.captures.outside import Outside
from rayscan.config import IngestConfig, RunConfig
from rayscan.errors import ConfigError
from rayscan.tables import Workspace

KEY_VARIABLE = "RAYSCAN_ANONYMISE_KEY"
_CHECK = "pseudonyms.json"
Admit = Callable[[Batch], Batch]


def check_key(workspace: Workspace, ingest: IngestConfig) -> None:
    """On the driver, before the first task: the key is there and is the workspace's own; the first is noted.

    Raises ConfigError. Nothing is asked for where addresses are stored as they are.
    """
    if ingest.addresses == "raw":
        return
    key = _key(ingest.key_file)
    if workspace.read_json(_CHECK) is None:
        salt = os.urandom(16)
        workspace.write_json(_CHECK, {"salt": salt.hex(), "check": check_value(key, salt)})
    _compare(workspace, key)


def admission(workspace: Workspace, config: RunConfig) -> Admit:
    """In a task: what to do with each batch of a capture. Raises ConfigError as `check_key` does."""
    outside = Outside(config.captures)
    if config.ingest.addresses == "raw":
        return outside
    key = _key(config.ingest.key_file)
    _compare(workspace, key)
    pseudonyms = Pseudonyms(key)

    def admit(batch: Batch) -> Batch:
        batch = outside(batch)  # asks of the addresses as they are
        return batch._replace(flows=pseudonyms.hide(batch.flows))

    return admit


def _compare(workspace: Workspace, key: bytes) -> None:
    noted = workspace.read_json(_CHECK) or {}
    if not is_key(key, bytes.fromhex(noted["salt"]), noted["check"]):
        raise ConfigError(
            f"the addresses in {workspace.uri} were made with another key than the one given; "
            "give that key, or use another workspace"
        )


def _key(file: str | None) -> bytes:
    if file is not None:
        try:
            return key_of(Path(file).read_bytes(), file)
        except OSError as error:
            raise ConfigError(f"cannot read the key in ingest.key_file {file}: {error.strerror}") from None
    given = os.environ.get(KEY_VARIABLE, "")
    if not given.strip():
        raise ConfigError(
            f"ingest.addresses is cryptopan, but there is no key: set {KEY_VARIABLE} (on every machine of a "
            "cluster), or ingest.key_file; `openssl rand -hex 32` makes one"
        )
    return key_of(given.encode(), KEY_VARIABLE)

"""File systems behind paths and URIs: folders, `s3://`, and `gs://` and `az://` as the libraries give them.

Two libraries touch storage: Arrow reads and writes files, delta-rs commits. Each finds credentials by itself
in its cloud's usual chain (environment, profile, role of the machine), so that none passes through here and
a file system that is sent to a worker carries none. What the two would understand differently (endpoint,
region, patience) is worked out here once and told to both. docs/storage.md says what was tried.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pyarrow.fs as pafs
from deltalake.exceptions import DeltaError

from rayscan.config import without_credentials
from rayscan.errors import ConfigError, WorkspaceError, in_short, why

CONNECT_S = 10
SILENCE_S = 60  # a request in which nothing moves for so long is given up, and tried again
PATIENCE_S = 90  # with storage that answers with 5xx, throttles, or is not there
TRIES = 10  # of Arrow in that time, by its own backoff: 82 to 94 s, measured


def is_remote(uri: str) -> bool:
    """Does this lie on object storage?"""
    return "://" in uri and not uri.startswith("file://")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises ConfigError for other schemes, and for a URI with credentials in it.
    """
    scheme, _, rest = without_credentials(uri).partition("://") if "://" in uri else ("file", "", uri)
    match scheme:
        case "file":
            return pafs.LocalFileSystem(), str(Path(rest).expanduser().absolute())
        case "s3":
            return _s3(), rest.rstrip("/")
        case "gs":
            return pafs.GcsFileSystem(retry_time_limit=timedelta(minutes=2)), rest.rstrip("/")
        case "az":
            return pafs.AzureFileSystem(_azure_account()), rest.rstrip("/")
    raise ConfigError(
        f"{uri}: {scheme}:// is not supported; use a folder, s3://bucket/prefix, gs://bucket/prefix or "
        "az://container/prefix"
    )


def uri_of(uri: str, path: str) -> str:
    """The URI of a path in the file system of `uri`."""
    return f"{uri.partition('://')[0]}://{path}" if is_remote(uri) else path


def delta_options(uri: str) -> dict[str, str] | None:
    """What delta-rs has to be told to reach the same place in the same way as `filesystem(uri)`."""
    if not is_remote(uri):
        return None
    options = {
        "connect_timeout": f"{CONNECT_S}s",
        "timeout": f"{SILENCE_S}s",
        "max_retries": "1000",  # more than there is time for
        "retry_timeout": f"{PATIENCE_S}s",
        # A pause is drawn up to `base` times the one before. With the library's own base of 2 pauses do not
        # grow (the mean logarithm of the factor is ln base - 1), and ten tries were over within 3 s.
        "backoff_config.init_backoff": "200ms",
        "backoff_config.max_backoff": "10s",
        "backoff_config.base": "4",
    }
    if uri.startswith("s3://"):
        endpoint = _s3_endpoint()
        if endpoint:
            options["AWS_ENDPOINT_URL"] = endpoint
            options["AWS_ALLOW_HTTP"] = str(endpoint.startswith("http://")).lower()
        # delta-rs would look for both in the environment alone, once there is an endpoint.
        options["AWS_REGION"] = _s3_region() or str(_s3().region)
        options["AWS_FORCE_CREDENTIAL_LOAD"] = "true"
    if uri.startswith("az://"):
        options["AZURE_STORAGE_ACCOUNT_NAME"] = _azure_account()
    return options


def _s3() -> pafs.FileSystem:
    endpoint, region = _s3_endpoint(), _s3_region()
    place = {"region": region} if region else {}
    if endpoint:  # buckets are then part of the path, which every other server understands
        scheme, _, host = endpoint.partition("://")
        place |= {"endpoint_override": host.rstrip("/"), "scheme": scheme}
    return pafs.S3FileSystem(
        **place,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        allow_delayed_open=True,  # a small file is then one request, not three
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def _s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")


def _azure_account() -> str:
    name = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not name:
        raise ConfigError("az:// needs the name of the storage account in AZURE_STORAGE_ACCOUNT_NAME")
    return name


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Raise WorkspaceError ("cannot `doing`: why") for whatever storage answers, but let missing files be.

    The error that came is kept as its cause.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise WorkspaceError(f"cannot {doing}: {why(error)}") from error
    except DeltaError as error:
        raise WorkspaceError(f"cannot {doing}: {in_short(error)}") from error

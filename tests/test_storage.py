"""Storage: what `filesystem` makes of a URI, what faults of a server cost, and what it is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import servers
from click.testing import CliRunner
from test_tables import INFO, KEY, OTHER, ids, put

from rayscan import schema
from rayscan.cli import main
from rayscan.config import IngestConfig, load
from rayscan.errors import CommitConflict, ConfigError, WorkspaceError
from rayscan.planning import find_captures
from rayscan.storage import delta_options, filesystem, uri_of
from rayscan.tables import Table, Workspace

LOG = r"_delta_log/0+{}\.json$"


def test_uris(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("a/b", f"{tmp_path}/a/b", f"file://{tmp_path}/a/b"):
        fs, path = filesystem(uri)
        assert (type(fs), path) == (pafs.LocalFileSystem, f"{tmp_path}/a/b")
        assert uri_of(uri, path) == path
    assert delta_options("a/b") is None
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    fs, path = filesystem("s3://bucket/some/prefix/")
    assert (type(fs), path, fs.region) == (pafs.S3FileSystem, "bucket/some/prefix", "eu-north-1")
    assert uri_of("s3://bucket/x", "bucket/y") == "s3://bucket/y"
    options = delta_options("s3://bucket/x") or {}
    assert options["AWS_REGION"] == "eu-north-1"
    assert "AWS_ENDPOINT_URL" not in options
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    assert (delta_options("s3://bucket/x") or {})["AWS_ALLOW_HTTP"] == "false"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # for S3 alone: it comes before the other
    assert (delta_options("s3://bucket/x") or {})["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert filesystem("gs://bucket/x")[1] == "bucket/x"
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        filesystem("az://container/x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "somebody")
    assert filesystem("az://container/x")[1] == "container/x"
    with pytest.raises(ConfigError, match=r"ftp:// is not supported; use a folder, s3://"):
        filesystem("ftp://x/y")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:{}@bucket/x",
        "s3://{}@bucket",
        "s3://KEY:a/{}@b/x",
        "gs://b/x?secret_key={}",
        "ftp://u:{}@h/x",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, tmp_path: Path) -> None:
    secret = "wJalrXUtnFEMI"
    uri, workspace = uri.format(secret), str(tmp_path / "ws")
    (tmp_path / "site.yaml").write_text(f"captures: {{paths: ['{uri}']}}")
    Workspace.open(workspace, IngestConfig())
    for words in (
        ["run", "-w", workspace, "--set", f"captures.paths={uri}"],
        ["run", "-w", workspace, "--config", str(tmp_path / "site.yaml")],
        ["run", "-w", workspace, "--set", f"captures.paths={{a: '{uri}'}}"],
        ["run", "-w", uri, "--set", f"captures.paths={tmp_path}"],
        ["run", "-w", workspace, "--model", uri],
        ["report", "-w", workspace, "--set", f"report.pfx2as={uri}"],
        ["status", "-w", uri],
        ["inspect", uri],
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2, words
        assert secret not in result.output
        assert "docs/storage.md" in result.stderr or "{a:" in words[-1]
    assert not any(secret in path.read_text() for path in tmp_path.rglob("ws/**/*.json"))
    with pytest.raises(ConfigError, match="keys and passwords must not stand there"):
        filesystem(uri)


@pytest.mark.parametrize(
    "uri", ["s3://b/me@x/a:b", "s3://b/2024-0?/x", "s3://b/p=20??/q=1", "file:///a@b?c=d"]
)
def test_what_a_key_or_pattern_may_hold(uri: str) -> None:
    assert load(sets=[f"captures.paths={uri}"], env={}).captures.paths == (uri,)


def test_a_folder_may_be_named_by_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    workspace = Workspace.open(f"file://{tmp_path}/ws", IngestConfig())
    assert workspace == Workspace.open(tmp_path / "ws")
    put(workspace.table("embeddings"), KEY, 1)
    (tmp_path / "a.csv").write_text("ts,src,dst_port,proto\n")
    for place in (tmp_path, f"file://{tmp_path}"):
        captures = load(sets=[f"captures.paths={place}"], env={}).captures
        found = find_captures(captures, Workspace.at(f"file://{tmp_path}/ws/").uri)
        assert [file.path for file in found] == [f"{tmp_path}/a.csv"]
    words = [
        "run",
        "-w",
        f"file://{tmp_path}/ws",
        "--set",
        f"captures.paths={tmp_path}",
        "--dry-run",
        "--json",
    ]
    ingest = json.loads(CliRunner().invoke(main, words).stdout)[0]
    assert (ingest["stage"], ingest["due"]) == ("ingest", 1)
    assert list((tmp_path / "here").iterdir()) == []


WRITE = """
import os, sys
sys.path.insert(0, os.environ["HERE"])
from test_tables import *
put(Workspace.open(sys.argv[1], IngestConfig()).table("embeddings"), KEY, 1)
"""


def test_both_libraries_find_keys_and_region_in_a_profile(
    s3_server: str, s3_prefix: str, tmp_path: Path
) -> None:
    """What signs requests of files and of commits is the same, also where nothing is in the environment."""
    (tmp_path / "config").write_text(
        "[profile team]\nregion=eu-west-3\n"
        """credential_process=/bin/echo '{"Version":1,"AccessKeyId":"TEAMKEY","SecretAccessKey":"s"}'\n"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "team"}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}
    log = tmp_path / "log"
    with servers.proxy(s3_server, log) as endpoint:
        environment |= {"AWS_ENDPOINT_URL": endpoint, "HERE": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", WRITE, s3_prefix], env=environment, check=True)
    signed = {(line["path"].rpartition("/")[2][:4], line["signed"]) for line in servers.requests(log)}
    assert {name for name, _ in signed} >= {"work", "part", "0000"}
    assert {by for _, by in signed} == {"TEAMKEY eu-west-3"}


# ---------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("kind", ["answer lost", "error after the deed", "reset", "internal error"])
def test_a_commit_whose_answer_is_lost_is_known_again(
    s3_server: str,
    s3_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    version: int,
) -> None:
    """The commit takes effect once, and is no conflict: storage refuses its repetition, but it is there."""
    only = "PUT .*" + LOG.format(version)
    faults = ("--rate", "1", "--times", "1", "--kinds", kind, "--only", only)
    with servers.proxy(s3_server, tmp_path / "log", *faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        table = Workspace.open(s3_prefix, IngestConfig()).table("embeddings")
        first = put(table, KEY, 1, 2, made_from=5)
        assert put(table, OTHER, 3, made_from=6) == first + 1
    struck = [line["path"] for line in servers.requests(tmp_path / "log") if line["fault"]]
    assert len(struck) == 1
    assert re.search(LOG.format(version), struck[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    table = Workspace.open(s3_prefix).table("embeddings")
    assert ids(table) == [1, 2, 3]
    assert table.is_done(KEY, 5)
    assert table.version() == first + 1


def test_faults_in_one_of_seven_requests_change_nothing(
    s3_server: str, s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.proxy(s3_server, tmp_path / "log", "--rate", "0.15", "--seed", "3") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        workspace = Workspace.open(s3_prefix, IngestConfig())
        table = workspace.table("embeddings")
        for number in range(3):
            put(table, KEY, number, number + 100, made_from=number)
            put(table, {**KEY, "bucket": number + 2}, number, made_from=number)
            workspace.write_json("runs/x.json", {"number": number})
            assert workspace.read_json("runs/x.json") == {"number": number}
        assert ids(table) == sorted([*range(3), 2, 102])
        with pytest.raises(CommitConflict):
            put(table, KEY, 9, made_from=9, read_version=2)
    kinds = {line["fault"] for line in servers.requests(tmp_path / "log")}
    assert len(kinds) >= 4, "too few faults to mean anything"


def test_storage_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.settings("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rayscan.storage.TRIES", 1)
    monkeypatch.setattr("rayscan.storage.PATIENCE_S", 1)
    with pytest.raises(WorkspaceError, match=r"cannot read s3://bucket/ws/workspace\.json: .*[Cc]onnect"):
        Workspace.open("s3://bucket/ws", IngestConfig())
    with pytest.raises(WorkspaceError, match=r"cannot open the table s3://bucket/ws/flows"):
        Workspace("s3://bucket/ws").table("flows").version()


def test_storage_that_is_away_for_a_moment_is_waited_for(
    s3_server: str, s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both libraries, for longer than ten tries of either would last without growing pauses."""
    table = Workspace.open(s3_prefix, IngestConfig()).table("embeddings")
    put(table, KEY, 1)
    port = servers.free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(look) for look in (table.version, lambda: Workspace.open(s3_prefix))]
        time.sleep(6)
        assert not any(task.done() for task in tasks)
        with servers.proxy(s3_server, tmp_path / "log", port=port):
            for task in tasks:
                task.result()


# ---------------------------------------------------------------------------------------------
# What is asked of the server
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def watched(
    s3_server: str, s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Table, Path]]:
    """A table, and the log of all requests to its server."""
    with servers.proxy(s3_server, tmp_path / "log") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield Workspace.open(s3_prefix, IngestConfig()).table("embeddings"), tmp_path / "log"


def test_large_files_go_in_parts(watched: tuple[Table, Path]) -> None:
    table, log = watched
    rng = np.random.default_rng(0)
    n, d = 3000, 2048  # 24 MB that do not compress
    vectors = pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1, dtype=np.int32) * d), pa.array(rng.random(n * d, dtype=np.float32))
    )
    times = pa.array(np.arange(n) + 1_700_000_000_000_000, schema.TIME)
    rows = pa.table({"sequence_id": np.arange(n), "src": np.arange(n), "start": times, "vector": vectors})
    table.replace([KEY], [table.write(rows.cast(schema.EMBEDDINGS), KEY)], {}, INFO)
    assert table.read(KEY, ["sequence_id", "vector"])["vector"].combine_chunks().equals(vectors)
    parts = [line["bytes"] for line in servers.requests(log) if "partNumber" in line["query"]]
    assert len(parts) >= 2
    assert max(parts) < 20e6


def test_no_prefix_is_listed_but_that_of_the_log(watched: tuple[Table, Path]) -> None:
    """However many files a table has, committing and reading list its log and nothing else."""
    table, log = watched
    for number in range(24):
        put(table, {**KEY, "bucket": number}, number, made_from=number)
    begun = len(servers.requests(log))
    put(table, KEY, 5, made_from=99)
    ids(table, KEY)
    table.done([KEY, OTHER])
    made = servers.requests(log)[begun:]
    listed = [line["query"]["prefix"] for line in made if "prefix" in line["query"]]
    listed = [
        line["query"]["prefix"] for line in made if line["method"] == "GET" and "prefix" in line["query"]
    ]
    assert listed
    assert all(prefix.rstrip("/").endswith("_delta_log") for prefix in listed)
    assert len(made) < 120  # a checkpoint every ten commits keeps it from growing

"""The cookbook: every query of docs/queries.md runs on a small workspace and finds something."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import pytest
from deltalake import DeltaTable
from small_workspace import small_workspace

TEXT = (Path(__file__).parent.parent / "docs" / "queries.md").read_text("utf-8")
BLOCKS = re.findall(r"```sql\n(.*?)```", TEXT, re.S)
TITLES = re.findall(r"^## (\d+\..*)$", TEXT, re.M)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    workspace = small_workspace(tmp_path_factory.mktemp("queries") / "ws")
    connection = duckdb.connect()
    for name in re.findall(r'"(\w+)"', re.search(r"for name in (.*):", TEXT)[1]):  # type: ignore[index]
        table = DeltaTable(workspace.url(name)).to_pyarrow_dataset()
        connection.register(name, table)
    connection.execute(BLOCKS[0])
    return connection


def test_there_are_ten() -> None:
    assert len(TITLES) == 10 == len(BLOCKS) - 1


@pytest.mark.parametrize(("title", "query"), list(zip(TITLES, BLOCKS[1:], strict=True)))
def test_query(database: duckdb.DuckDBPyConnection, title: str, query: str) -> None:
    rows = database.execute(query).fetchall()
    assert rows, f"{title} finds nothing"

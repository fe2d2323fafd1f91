"""Arrow to arrays to padded tensors: nothing moves, nothing is guessed from values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan import schema
from rayscan.config import ModelConfig
from rayscan.errors import DataError, ModelError, SchemaError
from rayscan.model.features import GAP_CENTRE, GAP_SPREAD, Sequences, collate, concat, gap_feature

INPUTS = ("dst", "dst_port", "proto", "gap")
START = 1_700_000_000_000_000


def table(flows: list[list[int]], **replaced: list) -> pa.Table:
    """A sequences table whose lists hold the given numbers (as ports; others follow from them)."""
    n = len(flows)
    columns = {
        "sequence_id": list(range(100, 100 + n)),
        "src": [7] * n,
        "index": list(range(n)),
        "sequences": [n] * n,
        "start": [START + i for i in range(n)],
        "end": [START + 10**6] * n,
        "length": [len(f) for f in flows],
        "dst": [[2**32 - 1 - x for x in f] for f in flows],
        "dst_port": flows,
        "proto": [[x % 256 for x in f] for f in flows],
        "gap_us": [[0] + [1000 * x for x in f[1:]] for f in flows],
        "ttl": None,
        "size": None,
        "tcp_flags": None,
        "src_port": None,
        "icmp_code": None,
        "zmap": None,
        "masscan": None,
        "mirai": None,
        "label": None,
    }
    columns |= replaced
    arrays = [
        pa.array([None] * n if columns[f.name] is None else columns[f.name], f.type) for f in schema.SEQUENCES
    ]
    return pa.Table.from_arrays(arrays, schema=schema.SEQUENCES)


def test_arrays_are_the_tables_own():
    sequences = Sequences.from_table(table([[1, 2, 3], [4], [5, 6]]), INPUTS)
    assert sequences.offsets.tolist() == [0, 3, 4, 6]
    assert sequences.lengths.tolist() == [3, 1, 2]
    assert sequences.columns["dst_port"].tolist() == [1, 2, 3, 4, 5, 6]
    assert sequences.columns["gap_us"].tolist() == [0, 2000, 3000, 0, 0, 6000]
    assert sequences.start.tolist() == [START, START + 1, START + 2]
    assert sequences.sequence_id.tolist() == [100, 101, 102]
    assert set(sequences.columns) == {"dst", "dst_port", "proto", "gap_us"}


def test_no_copy_of_one_chunk():
    source = table([[1, 2, 3], [4, 5]])
    ports = Sequences.from_table(source, INPUTS).columns["dst_port"]
    address = source["dst_port"].chunk(0).flatten().buffers()[1].address
    assert ports.__array_interface__["data"][0] == address


def test_chunks_and_slices():
    whole = table([[1, 2, 3], [4], [5, 6], [7, 8]])
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2), whole.slice(3)])
    for part, expected in ((pieces, [1, 2, 3, 4, 5, 6, 7, 8]), (whole.slice(1, 2), [4, 5, 6])):
        assert Sequences.from_table(part, INPUTS).columns["dst_port"].tolist() == expected


def test_empty_table():
    sequences = Sequences.from_table(table([]), INPUTS)
    assert len(sequences) == 0
    assert len(concat([sequences, Sequences.from_table(table([[1, 2]]), INPUTS)])) == 1


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=8), st.data())
@settings(max_examples=40, deadline=None)
def test_take_and_concat_agree_with_lists(flows, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(flows) - 1), max_size=10)), np.int64)
    sequences = Sequences.from_table(table(flows), INPUTS)
    taken = sequences.take(rows)
    joined = concat([sequences, taken])
    lists = flows + [flows[i] for i in rows]
    assert joined.columns["dst_port"].tolist() == [x for f in lists for x in f]
    assert joined.lengths.tolist() == [len(f) for f in lists]
    assert taken.sequence_id.tolist() == [100 + i for i in rows]


def test_collate_pads_on_the_right_by_length():
    config = ModelConfig(inputs=("dst_port", "proto"))
    # Port 0 and protocol 0 are values, not padding.
    sequences = Sequences.from_table(table([[0, 0, 0], [9]]), config.inputs)
    batch = collate(sequences, np.array([1, 0]), config)
    assert batch["mask"].tolist() == [[True, False, False], [True, True, True]]
    assert batch["dst_port"].tolist() == [[9, 0, 0], [0, 0, 0]]
    assert str(batch["dst_port"].dtype) == "torch.int64"


def test_collate_ends_with_the_longest_of_the_batch():
    config = ModelConfig()
    sequences = Sequences.from_table(table([[1, 2, 3], [4], [5, 6]]), config.inputs)
    batch = collate(sequences, np.array([1, 2]), config)
    assert {name: tuple(x.shape) for name, x in batch.items()} == {name: (2, 2) for name in (*INPUTS, "mask")}
    assert batch["dst"].tolist() == [[2**32 - 5, 0], [2**32 - 6, 2**32 - 7]]


def test_gap_is_log_of_seconds_standardised():
    config = ModelConfig()
    gap = np.array([[0, 1_000_000, 60_000_000]])
    expected = (np.log1p([0, 1e3, 6e4]) - GAP_CENTRE) / GAP_SPREAD
    np.testing.assert_allclose(gap_feature(gap, np.array([START]), config)[0], expected, rtol=1e-6)


def test_float32_time_loses_short_gaps_and_int64_does_not():
    gap = np.array([[0, 400_000, 1_600_000, 30_000_000, 3_600_000_000]])
    start = np.array([START])
    lossy = gap_feature(gap, start, ModelConfig(time="float32"))[0]
    # The published computation, on absolute times.
    absolute = (START + np.cumsum(gap[0])).astype(np.float32)
    np.testing.assert_array_equal(lossy[1:], np.log1p(absolute[1:] - absolute[:-1]))
    assert lossy[:4].tolist() == [0, 0, 0, 0]
    assert abs(np.expm1(lossy[4]) - 3.6e9) < 2**27  # one float32 step at this epoch: 134 s
    exact = gap_feature(gap, start, ModelConfig())[0]
    assert (np.diff(exact) > 0.1).all()


def test_missing_input_is_refused_by_name():
    with pytest.raises(ModelError, match=r"ttl.*2 of 2 sequences"):
        Sequences.from_table(table([[1], [2]]), ("ttl",))
    with pytest.raises(ModelError, match=r"size.*1 of 2"):
        Sequences.from_table(table([[1], [2]], size=[[40], None]), ("size",))


@pytest.mark.parametrize(
    ("replaced", "error", "words"),
    [
        ({"length": [2, 1]}, SchemaError, "dst_port"),
        ({"dst_port": [[1], [None]]}, SchemaError, "dst_port"),
        ({"dst_port": [[1], [65536]]}, DataError, r"dst_port.*65536"),
        ({"dst_port": [[1], [-2]]}, DataError, "dst_port"),
        ({"length": [1, 0], "dst_port": [[1], []]}, DataError, "no flow"),
    ],
)
def test_inconsistent_tables_are_refused(replaced, error, words):
    with pytest.raises(error, match=words):
        Sequences.from_table(table([[1], [2]], **replaced), ("dst_port",))


def test_negative_gap_is_refused():
    with pytest.raises(DataError, match="gap_us"):
        Sequences.from_table(table([[1, 2]], gap_us=[[0, -5]]), ("gap",))


def test_absent_column_is_refused():
    with pytest.raises(SchemaError, match="dst_port is absent"):
        Sequences.from_table(table([[1]]).drop_columns(["dst_port"]), ("dst_port",))

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rayscan.cli import main
from rayscan.errors import DataError, FormatError, RayscanError, SchemaError
from rayscan.methods import anomaly, clan

SMALL = clan.Settings(width=24, d_out=8, batch=64, steps=60, peak_rate=3e-3)
QUICK = anomaly.Tuning(epochs=15, rate=3e-3)


def _rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """400 benign rows with three hidden causes, an attack without them, a shifted one, and a rare one."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((3, 10))
    benign = rng.standard_normal((400, 3)) @ mixing
    loose = rng.standard_normal((150, 10)) * benign.std(0)
    shifted = rng.standard_normal((150, 3)) @ mixing + 4 * rng.standard_normal(10)
    rare = rng.standard_normal((20, 10)) * benign.std(0)
    labels = np.repeat(["usual", "loose", "shifted", "rare"], [400, 150, 150, 20])
    return np.concatenate([benign, loose, shifted, rare]), labels


def _read(text: str, label: str = "Label", without: tuple[str, ...] = ()) -> anomaly.Rows:
    file = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
    return anomaly.read_rows(file, "t.csv", label, without)


# ---------------------------------------------------------------------------------------------
# reading
# ---------------------------------------------------------------------------------------------


def test_columns_that_give_the_answer_away_are_no_features():
    """Of Zeek, UNSW-NB15 and NetFlow tables: who, when, and a second label in numbers."""
    names = [
        "ts",
        "id.orig_p",
        "dsport",
        "Stime",
        "L4_SRC_PORT",
        "IPV4_DST_ADDR",
        "attack_cat",
        "Label",
        "bytes",
    ]
    text = "Attack," + ",".join(names) + "\n"
    text += "".join(f"{'dos' if i % 2 else 'benign'}," + ",".join([str(i)] * 9) + "\n" for i in range(6))
    rows = _read(text, "Attack")
    assert rows.names == ["bytes"]
    assert {rows.left_out[name] for name in names[:6]} == {"says who or when"}
    assert {rows.left_out[name] for name in names[6:8]} == {"is called like a label"}
    two = text.replace("bytes", "bytes,packets", 1).replace("\n", ",9\n").replace("packets,9", "packets")
    assert (
        _read(two + "benign" + ",1" * 10 + "\n", "Attack", ("bytes",)).left_out["bytes"] == "was asked to be"
    )
    with pytest.raises(SchemaError, match="no column 'bites'"):
        _read(text, "Attack", ("bites",))


def test_large_numbers_are_scaled_around_their_own_mean():
    rows = 1.7e9 + np.random.default_rng(0).standard_normal((2000, 1))
    scaled = clan.Scaling.learn(rows)(rows)
    assert abs(scaled.mean()) < 1e-3 and scaled.std() == pytest.approx(1, abs=0.01)


def test_a_row_without_a_number_loses_its_label_too():
    text = (
        "Flow ID,Dst Port, Bytes ,Rate,Name,Zero,Gap, Label\n"
        "a,80,1,0.5,x,0,,one\n"
        "b,80,2,NaN,x,0,7,two\n"
        "c,80,3,Infinity,x,0,7,three\n"
        "d,80,4,1e3,12,0,7, four \n"
        "e,80,word,1,x,0,7,five\n"
        "f,80,6,2,x,0,7,\n"
        "g,80\n"
        "h,80,8,2,x,0,7,eight\n"
    )
    rows = _read(text)
    assert rows.labels.tolist() == ["four", "eight"]
    assert rows.names == ["Bytes", "Rate"] and rows.features.tolist() == [[4, 1000], [8, 2]]
    assert (rows.dropped, rows.ragged) == (5, 1)
    assert rows.left_out == {
        "Flow ID": "says who or when",
        "Dst Port": "says who or when",
        "Name": "holds hardly any numbers",
        "Zero": "is the same in all rows",
        "Gap": "is the same in all rows",
    }


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("a,b\n1,2\n", SchemaError, "no column 'Label'; there are a, b"),
        ("a,Label\n", FormatError, "no rows"),
        ("a,Label\nx,y\n", DataError, "no column of numbers"),
        ("a,Label\n3,y\n3,z\n", DataError, "no column of different numbers"),
        ("a,Label\n3,\n", DataError, "none of 1 rows"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, kind: type[RayscanError], message: str):
    with pytest.raises(kind, match=message):
        _read(text)


def test_complete_rows_keep_their_labels():
    features = np.array([[1.0, 2], [np.nan, 2], [3, np.inf], [4, 5]])
    kept, labels, dropped = anomaly.complete(features, np.array(["a", "b", "c", "d"]))
    assert kept.tolist() == [[1, 2], [4, 5]] and labels.tolist() == ["a", "d"] and dropped == 2


# ---------------------------------------------------------------------------------------------
# anomalies
# ---------------------------------------------------------------------------------------------


def test_half_of_each_class_trains_and_none_of_a_rare_one():
    labels = np.repeat(["a", "b", "c"], [101, 100, 99])
    train = anomaly.halves(labels, 3)
    assert [int(train[labels == label].sum()) for label in "abc"] == [50, 50, 0]
    assert np.array_equal(train, anomaly.halves(labels, 3))
    assert not np.array_equal(train, anomaly.halves(labels, 4))


def test_an_inverted_detector_is_not_praised():
    labels = np.array(["usual"] * 4 + ["below"] * 2 + ["above"] * 2)
    scores = np.array([0.4, 0.5, 0.6, 0.7, 0.1, 0.2, 0.9, 0.65])
    train = np.array([True] * 2 + [False] * 6)
    found = anomaly.detected(scores, labels, train, "usual")
    # Test rows are usual 0.6 and 0.7: above has 0.9 (both) and 0.65 (one of two), below none.
    assert found.auroc == {"below": 0.0, "above": 0.75} and found.mean == 0.375
    assert found.zero_day == ["above", "below"]


def test_columns_constant_among_benign_rows_are_scaled():
    features, labels = _rows()
    features[:, 0] = np.where(labels == "usual", 5.0, 6.0)
    usual = features[labels == "usual"]
    detector = anomaly.learn_benign(usual, replace(SMALL, steps=2), 0)
    assert detector.scaling.deviation[0] == 1
    assert np.isfinite(detector.scores(features)).all()


def test_the_protocol_from_end_to_end():
    features, labels = _rows()
    rows = anomaly.Rows([f"f{k}" for k in range(10)], features, labels, {}, 0, 0)
    found = anomaly.run(rows, "usual", [8], 0, SMALL, QUICK)
    assert found["zero_day"] == ["rare"] and set(found["auroc"]) == {"loose", "shifted", "rare"}
    assert min(found["auroc"].values()) > 0.75
    assert found["mean_auroc"] == pytest.approx(np.mean(list(found["auroc"].values())))
    assert found["few"]["8"]["f1"] > 0.6  # guessing gives a third
    assert found == anomaly.run(rows, "usual", [8], 0, SMALL, QUICK)
    json.dumps(found)


def test_the_benign_class_must_be_there():
    features, labels = _rows()
    rows = anomaly.Rows(["f"] * 10, features, labels, {}, 0, 0)
    with pytest.raises(DataError, match=r"0 rows are labelled 'BENIGN'.*loose, rare, shifted, usual"):
        anomaly.run(rows, "BENIGN", [], 0, SMALL, QUICK)
    alone = rows._replace(features=features[:400], labels=labels[:400])
    with pytest.raises(DataError, match="nothing to tell them from"):
        anomaly.run(alone, "usual", [], 0, SMALL, QUICK)


# ---------------------------------------------------------------------------------------------
# a few labels
# ---------------------------------------------------------------------------------------------


def test_a_class_of_one_row_is_drawn_like_any_other():
    classes = np.repeat([0, 1, 2], [1, 10, 89])
    drawn = anomaly.balanced(classes, 6000, torch.Generator().manual_seed(0)).numpy()
    shares = np.bincount(classes[drawn], minlength=3) / 6000
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_few_of_each():
    classes = np.repeat([0, 1, 2], [5, 2, 9])
    rows = np.array([0, 1, 2, 5, 6, 7, 8, 9])
    found = anomaly.few_of_each(classes, rows, 3, np.random.default_rng(0))
    assert sorted(found[:3]) == [0, 1, 2] and sorted(found[3:5]) == [5, 6]
    assert len(found) == 8 and set(found[5:]) <= {7, 8, 9}


def test_scores_by_hand():
    found = anomaly.scores_of(np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0]))
    assert found.accuracy == 3 / 5
    assert found.precision == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.recall == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found.f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_few_labels_are_scaled_once_and_leave_the_detector_alone(monkeypatch: pytest.MonkeyPatch):
    features, labels = _rows()
    features = 100 + 50 * features
    train = anomaly.halves(labels, 0)
    detector = anomaly.learn_benign(features[train & (labels == "usual")], replace(SMALL, steps=2), 0)
    before = {name: value.clone() for name, value in detector.encoder.state_dict().items()}
    given = []
    whole = anomaly.fine_tune

    def noting(encoder, rows, classes, tuning, seed):
        given.append((rows, classes))
        return whole(encoder, rows, classes, tuning, seed)

    monkeypatch.setattr(anomaly, "fine_tune", noting)
    anomaly.few_labels(detector, features, labels, train, 8, replace(QUICK, epochs=2), 0)
    rows, classes = given[0]
    assert np.bincount(classes).tolist() == [8, 8, 8]  # the rare class has no part in it
    scaled = detector.scaling(features[train])
    assert all((scaled == row).all(1).any() for row in rows)
    assert all(torch.equal(before[name], value) for name, value in detector.encoder.state_dict().items())


# ---------------------------------------------------------------------------------------------
# the command
# ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path):
    features, labels = _rows()
    lines = [",".join([*map(str, row), label]) for row, label in zip(features, labels, strict=True)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([",".join([*(f"f{k}" for k in range(10)), "kind"]), *lines, "1,2"]) + "\n")
    words = ["clan", "--csv", str(path), "--label-column", "kind", "--benign", "usual", "--steps", "2"]
    result = CliRunner().invoke(main, [*words, "--few", "1", "--json"], catch_exceptions=False)
    assert result.exit_code == 3, result.output  # one line could not be read
    found = json.loads(result.stdout)
    assert found["rows"] == 720 and found["ragged"] == 1 and list(found["few"]) == ["1"]
    shown = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "shifted" in shown.stdout and "zero-day" in shown.stdout and "1 lines unread" in shown.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--csv", "none.csv", "--label-column", "k"], 2, "none.csv"),
        (["--csv", "pyproject.toml"], 2, "--label-column"),
        (["--csv", "pyproject.toml", "--label-column", "k", "--few", "8,x"], 2, "8,x"),
    ],
)
def test_wrong_words_are_named(words: list[str], code: int, message: str):
    result = CliRunner().invoke(main, ["clan", *words])
    assert result.exit_code == code and message in result.stderr

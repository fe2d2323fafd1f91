"""Crypto-PAn against the sample of its authors and bit by bit; the key, and where it must not be."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.captures.anonymise import Pseudonyms, check_value, is_key, key_of
from rayscan.cli import main
from rayscan.config import load
from rayscan.errors import ConfigError
from rayscan.planning import CaptureFile, capture_units
from rayscan.simulate import simulate_to
from rayscan.stages.admission import KEY_VARIABLE, check_key
from rayscan.stages.ingest import Counts, Ingested, _Ledger, ingest_file
from rayscan.tables import CommitInfo, Workspace

KEY = bytes.fromhex("1522178d33a4cf80130a5b1649907d10d8988f837979652762574c2d2a842202")
SAMPLE = """128.11.68.132 135.242.180.132
129.118.74.4 134.136.186.123
130.132.252.244 133.68.164.234
141.223.7.43 141.167.8.160
141.233.145.108 141.129.237.235
152.163.225.39 151.140.114.167
156.29.3.236 147.225.12.42
165.247.96.84 162.9.99.234
166.107.77.190 160.132.178.185
192.102.249.13 252.138.62.131
192.215.32.125 252.43.47.189
192.233.80.103 252.25.108.8
192.41.57.43 252.222.221.184
193.150.244.223 253.169.52.216
195.205.63.100 255.186.223.5
198.200.171.101 249.199.68.213
198.26.132.101 249.36.123.202
198.36.213.5 249.7.21.132
198.51.77.238 249.18.186.254
199.217.79.101 248.38.184.213
202.49.198.20 245.206.7.234
203.12.160.252 244.248.163.4
204.184.162.189 243.192.77.90"""
"""Key and addresses of the sample that comes with the reference implementation."""


def number(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def test_the_sample_of_the_authors() -> None:
    pairs = [[number(text) for text in line.split()] for line in SAMPLE.splitlines()]
    raw, hidden = np.array(pairs).T
    assert np.array_equal(Pseudonyms(KEY)(raw), hidden)


def bit_by_bit(address: int, key: bytes) -> int:
    """The definition, one address and one block at a time."""
    encrypt = Cipher(algorithms.AES(key[:16]), modes.ECB()).encryptor().update
    pad = encrypt(key[16:])
    first, flips = int.from_bytes(pad[:4], "big"), 0
    for k in range(32):
        keep = (0xFFFFFFFF << (32 - k)) & 0xFFFFFFFF
        block = ((address & keep) | (first & ~keep)).to_bytes(4, "big") + pad[4:]
        flips = flips << 1 | encrypt(block)[0] >> 7
    return address ^ flips


@settings(max_examples=40)
@given(key=st.binary(min_size=32, max_size=32), asked=st.lists(st.integers(0, 2**32 - 1), max_size=12))
def test_the_definition(key: bytes, asked: list[int]) -> None:
    hidden = Pseudonyms(key)(np.array(asked, np.int64))
    assert hidden.tolist() == [bit_by_bit(address, key) for address in asked]


def test_prefixes_are_kept_exactly() -> None:
    rng = np.random.default_rng(0)
    raw = np.r_[rng.integers(0, 2**32, 3000), rng.integers(2**31, 2**31 + 600, 3000)]
    hidden = Pseudonyms(KEY)(raw)
    assert len(np.unique(hidden)) == len(np.unique(raw))
    i, j = rng.integers(0, len(raw), (2, 20_000))
    common = np.frexp((raw[i] ^ raw[j]).astype(float))[1]  # bits after the common prefix
    assert np.array_equal(common, np.frexp((hidden[i] ^ hidden[j]).astype(float))[1])


def test_keys() -> None:
    assert key_of(KEY.hex().encode() + b"\n", "f") == KEY
    assert key_of(b"32-char-str-for-AES-key-and-pad.", "f") == b"32-char-str-for-AES-key-and-pad."
    with pytest.raises(ConfigError, match="must be 64 hexadecimal digits or 32 bytes, not 9 bytes") as error:
        key_of(b"my secret", "f")
    assert "my secret" not in str(error.value)
    salt = b"s" * 16
    assert is_key(KEY, salt, check_value(KEY, salt))
    assert not is_key(KEY[::-1], salt, check_value(KEY, salt))
    assert check_value(KEY, salt) != check_value(KEY, b"t" * 16)


# ---------------------------------------------------------------------------------------------
# A workspace of pseudonyms
# ---------------------------------------------------------------------------------------------

CSV = """ts,src,dst,dst_port,proto,ip_id
2024-01-01T00:00:00Z,128.11.68.132,203.0.114.7,23,6,54321
2024-01-01T00:00:01Z,130.132.252.244,203.0.114.8,23,6,1
2024-01-01T00:00:02Z,10.0.0.1,203.0.114.8,23,6,1
2024-01-01T00:00:03Z,130.132.252.244,,23,6,1
"""


def ingest(folder: Path, *sets: str) -> tuple[Workspace, list[Ingested]]:
    """What the driver and the tasks do, in this process."""
    (folder / "c").mkdir(exist_ok=True)
    (folder / "c" / "flows.csv").write_text(CSV)
    config = load(sets=[f"captures.paths={folder / 'c'}", "ingest.addresses=cryptopan", *sets], env={})
    workspace = Workspace.open(folder / "ws", config.ingest)
    check_key(workspace, config.ingest)
    due: list[CaptureFile] = capture_units(workspace, config)
    results = [ingest_file(workspace, file, config) for file in due]
    _Ledger(workspace, 1, CommitInfo("run", "")).commit(results, Counts())
    return workspace, results


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    return path


def test_ingest_stores_pseudonyms_alone(tmp_path: Path, key_file: Path) -> None:
    workspace, results = ingest(tmp_path, f"ingest.key_file={key_file}")
    flows = workspace.table("flows").read().sort_by("ts")
    hidden = Pseudonyms(KEY)
    assert flows["src"].to_pylist() == [
        number(t) for t in ("135.242.180.132", "133.68.164.234", "133.68.164.234")
    ]
    expected = hidden(np.array([number("203.0.114.7"), number("203.0.114.8")])).tolist()
    assert flows["dst"].to_pylist() == [*expected, None]
    assert flows["fingerprint"].to_pylist()[0] == 1  # found before the address was hidden
    assert [(r.reason, r.count) for r in results[0].rejects] == [
        ("source in 10.0.0.0/8, private (RFC 1918)", 1)
    ]
    assert workspace.addresses == "cryptopan"
    raw = [
        n.to_bytes(8, order)
        for n in (number("128.11.68.132"), number("130.132.252.244"))
        for order in ("big", "little")
    ]
    secrets = [b"128.11.68.132", KEY, KEY.hex().encode(), *raw]
    files = [path for path in (tmp_path / "ws").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path


def test_another_key_and_raw_addresses_are_refused(tmp_path: Path, key_file: Path) -> None:
    ingest(tmp_path, f"ingest.key_file={key_file}")
    (tmp_path / "other").write_text(KEY[::-1].hex())
    with pytest.raises(ConfigError, match="made with another key"):
        ingest(tmp_path, f"ingest.key_file={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match=r"laid out with ingest\.addresses=cryptopan, not raw"):
        ingest(tmp_path, "ingest.addresses=raw")


def test_a_raw_workspace_takes_no_pseudonyms(tmp_path: Path, key_file: Path) -> None:
    ingest(tmp_path, "ingest.addresses=raw")
    with pytest.raises(ConfigError, match=r"laid out with ingest\.addresses=raw, not cryptopan"):
        ingest(tmp_path, f"ingest.key_file={key_file}")


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"there is no key: set {KEY_VARIABLE}"):
        ingest(tmp_path)
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
    workspace, _ = ingest(tmp_path)
    assert number("135.242.180.132") in workspace.table("flows").read()["src"].to_pylist()


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the key in ingest\.key_file"):
        ingest(tmp_path, f"ingest.key_file={tmp_path / 'nothing'}")


def test_sequences_are_those_of_the_raw_addresses(ray_session: None, tmp_path: Path, key_file: Path) -> None:
    """On Ray: the same flows under other addresses, which differ in nothing else."""
    captures = simulate_to(tmp_path / "telescope", months=1, sources=200, flows=4_000, seed=5).captures
    hidden = ["--set", "ingest.addresses=cryptopan", "--set", f"ingest.key_file={key_file}"]
    frames = []
    for place, sets in ((tmp_path / "raw", []), (tmp_path / "hidden", hidden)):
        for stage in ("ingest", "sequences"):
            words = [stage, "-w", str(place), "--set", f"captures.paths={captures}", *sets]
            assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
        frame = pl.from_arrow(Workspace.open(place).table("sequences").read())
        assert isinstance(frame, pl.DataFrame)
        frames.append(frame.sort("start", "end", "length"))
    raw, other = frames
    columns = ["period", "start", "end", "length", "index", "dst_port", "gap_us"]
    assert raw.height > 20 and raw.select(columns).equals(other.select(columns))
    pairs = pl.DataFrame({"raw": raw["src"], "hidden": other["src"]}).unique()
    assert np.array_equal(Pseudonyms(KEY)(pairs["raw"].to_numpy()), pairs["hidden"].to_numpy())

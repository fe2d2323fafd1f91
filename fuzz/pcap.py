"""Fuzz the packet readers with atheris, guided by coverage.

    pip install atheris
    python fuzz/pcap.py -max_total_time=60 [CORPUS]

The compiled kernels run as plain Python here: so their branches count as coverage, and an index outside of
an array is an IndexError instead of a read of foreign memory. The seeds are files of every link type, made by
the tests' own writer. A finding is written to the present folder as crash-*; give that file as the argument
to run it again. Whatever is raised but a FormatError is a finding, and so are a minute or 2 GB for one input.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

os.environ["NUMBA_DISABLE_JIT"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import atheris  # noqa: E402
import numpy as np  # noqa: E402

with atheris.instrument_imports(include=["rayscan.captures"]):
    from rayscan.captures.detect import READERS, open_capture

from packet_files import LINKS, pcap, pcapng, some_packets  # noqa: E402

from rayscan.config import CapturesConfig  # noqa: E402
from rayscan.errors import FormatError  # noqa: E402

CONFIGS = [CapturesConfig(), CapturesConfig(duplicates="drop"), CapturesConfig(aggregate=60)]


def read(data: bytes) -> None:
    """The first byte chooses the settings, the rest is the file."""
    config = CONFIGS[data[0] % len(CONFIGS)] if data else CONFIGS[0]
    try:
        kind, stream = open_capture(io.BytesIO(data[1:]), "fuzz", config)
        if kind not in ("pcap", "pcapng"):
            return
        packets = lost = 0
        for batch in READERS[kind](stream, "fuzz", config, 5):
            packets += sum(batch.flows["packets"].to_pylist())
            lost += sum(reject.count for reject in batch.rejects)
        if packets + lost > len(data) / 12:
            raise AssertionError(f"{packets} packets and {lost} rejects in {len(data)} bytes")
    except FormatError:
        pass


def seeds(folder: Path) -> None:
    for link in LINKS:
        packets = some_packets(link, 4, link)
        files = pcap(packets, link), pcap(packets, link, True, True), pcapng(packets, link)
        for number, file in enumerate(files):
            (folder / f"{link}-{number}").write_bytes(bytes([number]) + file)


def main() -> None:
    np.seterr(over="ignore")  # products of hashes wrap around, as they do when compiled
    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        given = sys.argv[1:]
        replay = any(Path(argument).is_file() for argument in given)
        limits = ["-timeout=60", "-rss_limit_mb=2048", "-max_len=1000"]
        atheris.Setup([sys.argv[0], *limits, *given, *([] if replay else [folder])], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""pcap: packets per second of one core, beside dpkt's objects; and memory for captures of any size.

    python -m benchmarks.pcap [--packets 1000000]
    python -m benchmarks.pcap --gigabytes 10 [--folder /tmp]

The captures are a simulated one and, where $RAYSCAN_DATA is set, a real one repeated. Both readers read the
same bytes in one process, in turn; CPU time, best of three. "dpkt objects" parses each packet with dpkt and
takes address, port and flags from the objects; "dpkt reader" only walks over the records.

With --gigabytes a capture of that size is written and ingested by one task's code in a process of its own,
and the process's largest memory is printed.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dpkt
import pyarrow.compute as pc

from rayscan.captures.detect import read_capture
from rayscan.config import load
from rayscan.planning import CaptureFile
from rayscan.simulate import simulate_to
from rayscan.stages.ingest import ingest_file
from rayscan.tables import Workspace

_HEADER = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--folder", type=Path, default=None, help="where the large capture is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        simulated = simulate_to(folder, months=1, flows=options.packets, sources=5000, pcap=True).files[0]
        if options.gigabytes:
            large = repeat(simulated, Path(folder) / "large.pcap", options.gigabytes)
            context = multiprocessing.get_context("spawn")
            worker = context.Process(target=ingest, args=(large, Path(folder) / "ws"))
            worker.start()
            worker.join()
            return
        report("simulated", simulated.read_bytes(), options.packets)
    if "RAYSCAN_DATA" in os.environ:
        real = Path(os.environ["RAYSCAN_DATA"]) / "captures/pcap/greynoise_brazil_storm.pcap"
        data = real.read_bytes()
        times = options.packets // 5170
        report("greynoise_brazil_storm, repeated", data[:_HEADER] + data[_HEADER:] * times, 5170 * times)


def report(name: str, file: bytes, packets: int) -> None:
    read: dict[str, Callable[[bytes], int]] = {
        "rayscan": rayscan,
        "rayscan, aggregate: 60s": aggregated,
        "dpkt reader": walk,
        "dpkt objects": parse,
    }
    for reader in read.values():
        assert reader(file) == packets  # the first call compiles, too
    print(f"{name}: {packets:,} packets, {len(file) / 1e6:,.0f} MB")
    best = {key: min(seconds(reader, file) for _ in range(3)) for key, reader in read.items()}
    for key, elapsed in best.items():
        ratio = best["dpkt objects"] / elapsed
        print(f"  {key:24} {packets / elapsed / 1e6:8.3f} M packets/s {ratio:7.1f} times dpkt objects")


def seconds(read: Callable[[bytes], int], file: bytes) -> float:
    start = time.process_time()
    read(file)
    return time.process_time() - start


def rayscan(file: bytes, *sets: str) -> int:
    config = load(sets=sets, env={})
    _, batches = read_capture(io.BytesIO(file), "capture", config.captures, config.ingest.batch_rows)
    return sum(pc.sum(batch.flows["packets"]).as_py() or 0 for batch in batches)


def aggregated(file: bytes) -> int:
    return rayscan(file, "captures.aggregate=60s")


def walk(file: bytes) -> int:
    return sum(1 for _ in dpkt.pcap.Reader(io.BytesIO(file)))


def parse(file: bytes) -> int:
    packets = 0
    for _, data in dpkt.pcap.Reader(io.BytesIO(file)):
        ip = dpkt.ip.IP(data)
        above = ip.data
        if isinstance(above, dpkt.tcp.TCP):
            _ = ip.src, ip.dst, above.sport, above.dport, above.flags, ip.ttl, ip.len, ip.id, above.seq
        elif isinstance(above, dpkt.udp.UDP):
            _ = ip.src, ip.dst, above.sport, above.dport, ip.ttl, ip.len, ip.id
        packets += 1
    return packets


def repeat(capture: Path, large: Path, gigabytes: float) -> Path:
    """The records of a capture again and again."""
    data = capture.read_bytes()
    capture.unlink()
    with large.open("wb") as file:
        file.write(data[:_HEADER])
        while file.tell() < gigabytes * 1e9:
            file.write(data[_HEADER:])
    return large


def ingest(capture: Path, place: Path) -> None:
    config = load(sets=[f"captures.paths={capture}"], env={})
    workspace = Workspace.open(place, config.ingest)
    size = capture.stat().st_size
    start, cpu = time.perf_counter(), time.process_time()
    result = ingest_file(workspace, CaptureFile(str(capture), size, None), config)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{size / 1e9:.1f} GB, {result.flows:,} packets to bucket files in {wall:.0f} s ({cpu:.0f} s of CPU)"
    )
    print(f"{result.flows / wall / 1e6:.2f} M packets/s; largest memory {memory:.2f} GB")
    print(f"rejects {result.rejects}, ended {result.ended}")


if __name__ == "__main__":
    main()

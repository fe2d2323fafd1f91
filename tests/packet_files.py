"""Packets and capture files made by hand, byte by byte, and what dpkt reads in them."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import dpkt

T0 = 1_709_294_400
LINKS = (1, 101, 12, 14, 228, 113, 276, 0, 108)
ETHERNET, RAW, COOKED, COOKED2, NULL, LOOP = 1, 101, 113, 276, 0, 108
IP, IP6, ARP = 0x0800, 0x86DD, 0x0806

Row = dict[str, Any]


class Packet(NamedTuple):
    """One packet, with its time in nanoseconds."""

    ns: int
    data: bytes
    wire: int | None = None  # bytes on the wire, where not all were captured


# ---------------------------------------------------------------------------------------------
# Packets
# ---------------------------------------------------------------------------------------------


def ipv4(
    payload: bytes = b"",
    proto: int = 6,
    src: int = 0x01020304,
    dst: int = 0xC6120001,
    ttl: int = 60,
    ip_id: int = 7,
    options: bytes = b"",
    fragment: int = 0,
    total: int | None = None,
) -> bytes:
    length = 20 + len(options)
    total = length + len(payload) if total is None else total
    head = struct.pack(">BBHHHBBHII", 0x40 | length // 4, 0, total, ip_id, fragment, ttl, proto, 0, src, dst)
    return head + options + payload


def tcp(src_port: int = 4000, dst_port: int = 23, seq: int = 99, flags: int = 2) -> bytes:
    return struct.pack(">HHIIBBHHH", src_port, dst_port, seq, 0, 5 << 4, flags, 1024, 0, 0)


def udp(src_port: int = 4000, dst_port: int = 53, payload: bytes = b"") -> bytes:
    return struct.pack(">HHHH", src_port, dst_port, 8 + len(payload), 0) + payload


def icmp(kind: int = 8, code: int = 0) -> bytes:
    return struct.pack(">BBHI", kind, code, 0, 5)


def on_link(
    link: int, packet: bytes, ethertype: int = IP, tags: Sequence[int] = (), big: bool = False
) -> bytes:
    """The packet behind the header of a link; `tags` are the types of its VLAN tags, outermost first."""
    types = [*tags, ethertype]
    behind = b"".join(struct.pack(">HH", 5, kind) for kind in types[1:])
    if link == ETHERNET:
        return bytes(range(12)) + struct.pack(">H", types[0]) + behind + packet
    if link == COOKED:
        return struct.pack(">HHH8sH", 0, 1, 6, b"address", types[0]) + behind + packet
    if link == COOKED2:
        return struct.pack(">HHIHBB8s", types[0], 0, 3, 1, 0, 6, b"address") + behind + packet
    if link in (NULL, LOOP):
        family = {IP: 2, IP6: 30}[ethertype]
        return struct.pack(">I" if big or link == LOOP else "<I", family) + packet
    return packet


def some_packets(seed: int, n: int, link: int, start: int = T0 * 10**9) -> list[Packet]:
    """Packets of every kind, some cut short, not all of them in time order."""
    draw = random.Random(seed)
    return [_some_packet(draw, link, start + i * 10**9 + draw.randrange(-(10**10), 10**10)) for i in range(n)]


def _some_packet(draw: random.Random, link: int, ns: int) -> Packet:
    port, payload = draw.randrange(65536), draw.randbytes(draw.randrange(20))
    proto, transport = draw.choice([
        (6, tcp(port, draw.randrange(65536), draw.randrange(2**32), draw.randrange(256)) + payload),
        (6, tcp(port, 23, 0xC6120001) + payload),  # Mirai
        (17, udp(port, draw.randrange(65536), payload)),
        (1, icmp(draw.randrange(256), draw.randrange(256)) + payload),
        (132, struct.pack(">HHII", port, 80, 1, 2)),
        (47, b"\0\0\x08\0" + payload),
        (2, payload),
    ])  # fmt: skip
    data = ipv4(
        transport,
        proto,
        src=draw.randrange(2**32),
        ttl=draw.randrange(256),
        ip_id=draw.choice([54321, draw.randrange(65536)]),
        options=draw.choice([b"", b"", b"\1" * 4, b"\7" * 40]),
        fragment=draw.choice([0, 0, 0, 0x4000, 0x2000, 0x2001, 185]),
        total=draw.choice([None, None, None, 0]),
    )
    ethertype = IP
    if link not in (RAW, 12, 14, 228) and draw.random() < 0.1:
        ethertype, data = IP6, b"\x60" + bytes(60)
    tags = draw.choice([(), (0x8100,), (0x88A8, 0x8100)]) if link == ETHERNET else ()
    data = on_link(link, data, ethertype, tags) + draw.choice([b"", b"padding"])
    cut = draw.choice([len(data), len(data), draw.randrange(len(data) + 1)])
    return Packet(ns, data[:cut], len(data))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def pcap(
    packets: Iterable[Packet], link: int = RAW, big: bool = False, nano: bool = False, snaplen: int = 65535
) -> bytes:
    order = ">" if big else "<"
    magic = 0xA1B23C4D if nano else 0xA1B2C3D4
    unit = 1 if nano else 1000
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snaplen, link)]
    for ns, data, wire in packets:
        seconds, rest = divmod(ns, 10**9)
        wire = len(data) if wire is None else wire
        parts.append(struct.pack(order + "IIII", seconds, rest // unit, len(data), wire) + data)
    return b"".join(parts)


def block(kind: int, body: bytes, big: bool = False) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(">I" if big else "<I", 12 + len(body))
    return struct.pack(">I" if big else "<I", kind) + length + body + length


def section(big: bool = False) -> bytes:
    return block(0x0A0D0D0A, struct.pack((">" if big else "<") + "IHHq", 0x1A2B3C4D, 1, 0, -1), big)


def interface(
    link: int, big: bool = False, resolution: int | None = None, offset: int | None = None
) -> bytes:
    order = ">" if big else "<"
    options = struct.pack(order + "HH4s", 2, 3, b"eth\0")
    if resolution is not None:
        options += struct.pack(order + "HHB3x", 9, 1, resolution)
    if offset is not None:
        options += struct.pack(order + "HHq", 14, 8, offset)
    return block(1, struct.pack(order + "HHI", link, 0, 0) + options + bytes(4), big)


def enhanced(packet: bytes, ticks: int, number: int = 0, big: bool = False) -> bytes:
    order = ">" if big else "<"
    head = struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, len(packet), len(packet))
    return block(6, head + packet + bytes(-len(packet) % 4), big)


def obsolete(packet: bytes, ticks: int, number: int = 0, big: bool = False) -> bytes:
    order = ">" if big else "<"
    head = struct.pack(order + "HHIIII", number, 0, ticks >> 32, ticks & 0xFFFFFFFF, len(packet), len(packet))
    return block(2, head + packet, big)


def pcapng(packets: Iterable[Packet], link: int = RAW, big: bool = False) -> bytes:
    """One section, one interface, microseconds."""
    blocks = [enhanced(data, ns // 1000, 0, big) for ns, data, _ in packets]
    return section(big) + interface(link, big) + b"".join(blocks)


# ---------------------------------------------------------------------------------------------
# dpkt
# ---------------------------------------------------------------------------------------------


def read_with_dpkt(file: bytes) -> tuple[list[Row], int]:
    """The flows of a file and how many packets there are, read with dpkt's objects."""
    reader: Any
    if file[:4] == b"\x0a\x0d\x0d\x0a":
        reader = dpkt.pcapng.Reader(io.BytesIO(file))
    else:
        reader = dpkt.pcap.Reader(io.BytesIO(file))
    packets = list(reader)
    rows = [row_of(ts, data, reader.datalink()) for ts, data in packets]
    return [row for row in rows if row is not None], len(packets)


def row_of(ts: float | Decimal | Fraction, data: bytes, link: int) -> Row | None:
    """Columns of a flow as dpkt sees them; None for a packet that is none."""
    try:
        ip = _network(data, link)
    except dpkt.UnpackError:
        return None
    if not isinstance(ip, dpkt.ip.IP) or ip.offset or len(ip.opts) < 4 * ip.hl - 20:
        return None
    us = int(Fraction(ts) * 10**6 + (Fraction(1, 2) if isinstance(ts, float) else 0))
    row: Row = dict.fromkeys(("dst_port", "src_port", "tcp_flags", "icmp_code"))
    row |= {"ts": us, "proto": ip.p, "ttl": ip.ttl, "size": ip.len or None, "packets": 1}
    row |= {"src": int.from_bytes(ip.src, "big"), "dst": int.from_bytes(ip.dst, "big")}
    seq = _transport(ip, row)
    if ip.p in (6, 17, 33, 132, 136) and row["dst_port"] is None:
        return None
    row["fingerprint"] = (ip.id == 54321) | (seq == row["dst"]) << 2
    row["fingerprint"] |= (seq is not None and ip.id == (row["dst"] ^ row["dst_port"] ^ seq) & 0xFFFF) << 1
    return row


def _network(data: bytes, link: int) -> Any:
    if link == ETHERNET:
        return dpkt.ethernet.Ethernet(data).data
    if link == COOKED:
        return dpkt.sll.SLL(data).data
    if link == COOKED2:
        return dpkt.sll2.SLL2(data).data
    if link in (NULL, LOOP):
        return dpkt.loopback.Loopback(data).data
    return dpkt.ip.IP(data)


def _transport(ip: dpkt.ip.IP, row: Row) -> int | None:
    """Fills in what stands behind the IP header; the TCP sequence number."""
    above = ip.data
    if isinstance(above, dpkt.tcp.TCP):
        row |= {"src_port": above.sport, "dst_port": above.dport, "tcp_flags": above.flags & 0xFF}
        return int(above.seq)
    if isinstance(above, dpkt.icmp.ICMP):
        row |= {"dst_port": above.type, "icmp_code": above.code}
    elif isinstance(above, dpkt.udp.UDP | dpkt.sctp.SCTP):
        row |= {"src_port": above.sport, "dst_port": above.dport}
    elif isinstance(above, bytes):  # cut off: dpkt gives it up as a whole
        return _rest(ip.p, above, row)
    return None


def _rest(proto: int, rest: bytes, row: Row) -> int | None:
    if proto in (6, 17, 33, 132, 136) and len(rest) >= 4:
        row["src_port"], row["dst_port"] = struct.unpack(">HH", rest[:4])
    if proto == 1:
        row["dst_port"] = rest[0] if rest else None
        row["icmp_code"] = rest[1] if len(rest) > 1 else None
    if proto == 6 and len(rest) >= 14:
        row["tcp_flags"] = rest[13]
    return int.from_bytes(rest[4:8], "big") if proto == 6 and len(rest) >= 8 else None

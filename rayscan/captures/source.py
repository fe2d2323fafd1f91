"""A capture's bytes, with the two questions a reader asks of them: who failed, and is it a bomb?

Arrow and the decompressors raise the same OSError for damaged data and for storage that went away. The first
is a fact about the capture and is counted; the second must stop the task so that it is tried again. `Source`
notes the failures of the storage itself, which tells the two apart.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

from rayscan.config import CapturesConfig
from rayscan.errors import FormatError

BUFFER_BYTES = 1 << 20
FREE_BYTES = 64 << 20
"""Output below which no expansion is refused."""

_PIECE_BYTES = 1 << 16
"""Decoded at a time, which is what Arrow's decoder loses before a damaged place."""

_XZ_MEMORY = 256 << 20
"""Bytes. `xz -9` asks for 65 MiB, a file made to do harm for 4 GiB."""

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""Magic bytes and names."""


def compression_of(head: bytes) -> str | None:
    """Name of the compression that a file's first bytes announce."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


DAMAGE = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What decompressors and Arrow raise for damaged data."""


class Source(io.RawIOBase):
    """A file whose own failures stay known as `failure`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0, /) -> int:
        place: int = self._try(self._file.seek, offset, whence)
        return place

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        data = self._try(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _try(self, call: Any, *args: int) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.failure = error
            raise


class Decompressed(io.RawIOBase):
    """The decompressed bytes of a file, streamed.

    Data before a damaged place, or before a bomb's limit, is delivered before the FormatError. Its offset
    counts decompressed bytes.
    """

    def __init__(self, file: BinaryIO, path: str, compression: str, config: CapturesConfig) -> None:
        self._source = Source(file)
        self._compressed = io.BufferedReader(self._source, BUFFER_BYTES)
        self._decoder = _decoder(self._compressed, compression)
        self._path, self._compression = path, compression
        self._config = config
        self._out = 0
        self._damage: FormatError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and self._damage is None:
            piece = self._next(len(view) - filled)
            if not piece:
                break
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        if not filled and self._damage is not None:
            raise self._damage
        return filled

    def _next(self, size: int) -> bytes:
        try:
            piece: bytes = self._decoder.read1(min(size, _PIECE_BYTES))
        except DAMAGE as error:
            if self._source.failure is not None:
                raise
            self._damage = FormatError(self._path, f"damaged: {self._compression}: {error}", self._out)
            return b""
        self._out += len(piece)
        self._damage = self._bomb()
        return b"" if self._damage else piece

    def _bomb(self) -> FormatError | None:
        reason = expansion(self._out, self._compressed.tell(), self._config)
        return None if reason is None else FormatError(self._path, reason, self._out)


def expansion(size: int, compressed: int, config: CapturesConfig) -> str | None:
    """Why `compressed` bytes that become `size` are refused as a bomb; None if they are not."""
    if size > max(FREE_BYTES, config.max_ratio * compressed):
        extent, setting = f"more than {config.max_ratio} times", "max_ratio"
    elif size > config.max_gb * 1e9:
        extent, setting = f"to more than {config.max_gb:g} GB", "max_gb"
    else:
        return None
    return f"expands {extent}; if it is genuine, raise captures.{setting}"


def _decoder(file: io.BufferedReader[Any], compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "bz2":
        return _Members(file, bz2.BZ2Decompressor)
    if compression == "xz":
        return _Members(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY))
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)


class _Members:
    """The members of a bz2 or xz file, one after the other, with zeros between them or not.

    The readers of the standard library take a damaged member behind a whole one for padding: they end
    there, without a word.
    """

    def __init__(self, file: io.BufferedReader[Any], decoder: Callable[[], Any]) -> None:
        self._file, self._new, self._decoder = file, decoder, decoder()

    def read1(self, size: int) -> bytes:
        data = b""
        while not data:
            packed = b""
            if self._decoder.eof:
                packed = self._next()
                if not packed:
                    break
                self._decoder = self._new()
            elif self._decoder.needs_input:
                packed = self._file.read1(_PIECE_BYTES)
                if not packed:
                    raise EOFError("cut off")
            data = self._decoder.decompress(packed, size)
        return data

    def _next(self) -> bytes:
        """What is there of the next member, nothing at the end of the file."""
        packed: bytes = self._decoder.unused_data.lstrip(b"\0")
        while not packed and (piece := self._file.read1(_PIECE_BYTES)):
            packed = piece.lstrip(b"\0")
        return packed

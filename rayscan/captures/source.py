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
from typing import Any, BinaryIO

import pyarrow as pa

from rayscan.errors import FormatError

BUFFER_BYTES = 1 << 20
FREE_BYTES = 64 << 20
"""Output below which no expansion is refused."""

_PIECE_BYTES = 1 << 16
"""Decoded at a time, which is what Arrow's decoder loses before a damaged place."""

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""Magic bytes and names."""

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

    Data before a damaged place is delivered before the FormatError. Its offset counts decompressed bytes.
    """

    def __init__(self, file: BinaryIO, path: str, compression: str, max_ratio: int) -> None:
        self._source = Source(file)
        self._compressed = io.BufferedReader(self._source, BUFFER_BYTES)
        self._decoder = _decoder(self._compressed, compression)
        self._path, self._compression, self._max_ratio = path, compression, max_ratio
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
        if self._out > max(FREE_BYTES, self._max_ratio * self._compressed.tell()):
            reason = f"expands more than {self._max_ratio} times; if it is genuine, raise captures.max_ratio"
            raise FormatError(self._path, reason, self._out)
        return piece


def _decoder(file: io.BufferedReader[Any], compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "bz2":
        return bz2.BZ2File(file)
    if compression == "xz":
        return lzma.LZMAFile(file)
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), compression)

"""A proxy before an S3 server that writes down every request, and fails some of them on purpose.

    python tests/s3_proxy.py http://127.0.0.1:5000 5001 requests.jsonl --seed 1 --rate 0.05

Each fault is one that real stores show. Some strike before the server hears of the request. Others strike
after it has done what was asked: its answer is lost, and whoever asks again finds the deed done. Which
requests are struck depends on the seed and on their number. `--only REGEX` strikes only requests whose
"METHOD /path?query" matches; `--times N` ends the faults after so many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

BEFORE = ("slow down", "internal error", "reset", "silence")
AFTER = ("answer lost", "error after the deed")
_SILENCE_S = 1.0
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>on purpose</Message></Error>"
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "upgrade"}


class Proxy:
    def __init__(self, given: argparse.Namespace) -> None:
        self.upstream, self.rate, self.kinds = given.upstream.rstrip("/"), given.rate, given.kinds
        self.only, self.times = re.compile(given.only), given.times
        self.chance = random.Random(given.seed)
        self.log = given.log.open("a", buffering=1)
        self.session: ClientSession | None = None

    def fault(self, what: str) -> str | None:
        struck = self.chance.random() < self.rate  # drawn for each request, so that numbers stay in step
        kind = self.chance.choice(self.kinds)
        if not (struck and self.times and self.only.search(what)):
            return None
        self.times -= 1
        return str(kind)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        what = f"{request.method} {request.raw_path}"
        kind = self.fault(what)
        body = await request.read()
        try:
            response = await self.answer(request, body, kind)
        finally:
            line: dict[str, Any] = {
                "method": request.method,
                "path": request.path,
                "query": dict(request.query),
            }
            line |= {"bytes": len(body), "fault": kind, "signed": _signer(request)}
            self.log.write(json.dumps(line) + "\n")
        return response

    async def answer(self, request: web.Request, body: bytes, kind: str | None) -> web.StreamResponse:
        if kind == "slow down":
            return web.Response(status=503, text=_ERROR.format("SlowDown"), content_type="application/xml")
        if kind == "internal error":
            return _broken()
        if kind == "silence":
            await asyncio.sleep(_SILENCE_S)
        if kind in ("silence", "reset"):
            return _hang_up(request)
        response = await self.forward(request, body)
        if kind == "answer lost":
            return _hang_up(request)
        return _broken() if kind == "error after the deed" else response

    async def forward(self, request: web.Request, body: bytes) -> web.Response:
        if self.session is None:
            unlimited = ClientTimeout(total=None)
            self.session = ClientSession(
                timeout=unlimited, auto_decompress=False, connector=TCPConnector(limit=0, force_close=True)
            )
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        async with self.session.request(
            request.method,
            f"{self.upstream}{request.raw_path}",
            headers=headers,
            data=body,
            allow_redirects=False,
            skip_auto_headers=("Content-Type", "Accept", "Accept-Encoding", "User-Agent"),
        ) as found:
            data = await found.read()
            kept: Any = [(k, v) for k, v in found.headers.items() if k.lower() not in _HOP]
            return web.Response(status=found.status, body=data, headers=kept)


def _signer(request: web.Request) -> str:
    """The name of the key and the region that a request was signed for."""
    signed = re.search(r"Credential=([^/]+)/[^/]*/([^/]+)/", request.headers.get("Authorization", ""))
    return " ".join(signed.groups()) if signed else ""


def _broken() -> web.Response:
    return web.Response(status=500, text=_ERROR.format("InternalError"), content_type="application/xml")


def _hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("port", type=int)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--times", type=int, default=10**9)
    parser.add_argument("--kinds", nargs="+", choices=(*BEFORE, *AFTER), default=(*BEFORE, *AFTER))
    proxy = Proxy(parser.parse_args())
    application = web.Application(client_max_size=2**40)
    application.router.add_route("*", "/{path:.*}", proxy.handle)
    port = parser.parse_args().port
    web.run_app(application, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()

"""The routes. Whatever is wrong with a request is said in a sentence of JSON, with a status of HTTP; nothing that a
client names is opened or fetched."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from enum import Enum
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tlx import __version__
from tlx.serve.decoding import Refused
from tlx.serve.service import Row, Service, sayable
from tlx.serve.uploads import closed, uploads_of

_PAGE = Path(__file__).with_name("page.html")
_LINGER_S = 2.0  # for a client that is still sending what was refused: without that it would not read why
_ROUTES = ("/", "/predict", "/model", "/metrics", "/healthz", "/readyz", "/openapi.json")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Any, Receive, Send], Awaitable[None]]

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class Json(Response):
    """UTF-8, without NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return (json.dumps(sayable(content), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class LastWord(Json):
    """An answer before the request has been read: the rest of it is thrown away for a moment, then the connection is
    closed. Closed at once, it would be reset, and the client would not see the answer."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if scope["tlx.body"] is _Body.COMES:
            with anyio.move_on_after(_LINGER_S):
                while scope["tlx.body"] is _Body.COMES:
                    await receive()
        await send({"type": "http.response.body", "body": b""})


class _Body(Enum):
    """What is known of a request's body: it comes; it has come (or the client has gone); it waits to be asked for
    (``Expect: 100-continue``), and is not."""

    COMES = 0
    HAS_COME = 1
    WAITS = 2


def app_of(service: Service) -> Asgi:
    """The application of ASGI, with its requests counted."""
    app = FastAPI(title="tlx serve", version=__version__, docs_url=None, redoc_url=None)  # those fetch from elsewhere
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers={"content-security-policy": policy})

    @app.get("/healthz")
    async def healthz() -> Response:
        """The process answers."""
        return Json({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> Response:
        """The network answers."""
        return Json({"status": "ready"}) if service.is_ready else Json({"status": "not ready"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/model")
    async def model() -> Response:
        """Classes, input, how good it is, and what is taken here."""
        return Json(about(service))

    @app.post("/predict", openapi_extra=_BODY)
    async def predict(request: Request) -> Response:
        """What the network says of pictures: a row for each, as `tlx predict --json` gives it."""
        return answer_of(await _asked(service, request))

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(HTTPException, _other)
    app.add_exception_handler(Exception, _fault)
    return _counted(app, service)


async def _asked(service: Service, request: Request) -> list[tuple[str, Row | Refused]]:
    """Names and rows of a request's pictures.

    Raises:
        Refused: the request as a whole: too large, too slow, at a time when there is too much to do.
    """
    limits, began = service.limits, time.monotonic()
    stage = "the upload"
    try:
        with anyio.fail_after(limits.seconds):
            with service.upload():
                uploads = await uploads_of(request, limits)
            stage = "the answer"
            with closed(uploads), service.place(len(uploads)):
                rows = await service.rows(uploads)
    except TimeoutError as error:
        took = f"{stage} took more than {limits.seconds:g} s"
        raise Refused(408 if stage == "the upload" else 504, took) from error
    finally:
        service.metrics.seconds.labels("/predict").observe(time.monotonic() - began)
    return [(upload.name, row) for upload, row in zip(uploads, rows, strict=True)]


def answer_of(rows: list[tuple[str, Row | Refused]]) -> Json:
    """200 where one picture at least was answered; else the status that all have, or 422."""
    said = [{"file": name, "error": row.why} if isinstance(row, Refused) else row for name, row in rows]
    refused = [row for _, row in rows if isinstance(row, Refused)]
    if len(refused) < len(rows):
        return Json({"predictions": said})
    status = refused[0].status if len({one.status for one in refused}) == 1 else 422
    name, first = rows[0][0], refused[0]
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return Json({"error": f"{name}: {first.why}{more}", "predictions": said}, status, _again(status))


def about(service: Service) -> dict[str, Any]:
    """What `/model` says: nothing of the machine that the network was trained on."""
    said, limits = service.network.description, service.limits
    return {
        "network": said.backbone["name"],
        "task": said.task["name"],
        "outputs": list(said.outputs),
        "input": said.data()["input"],
        "metrics": dict(said.metrics),
        "provenance": {name: said.provenance.get(name) for name in ("run", "step", "train_shards", "tlx")},
        "limits": {
            "bytes": limits.body_bytes,
            "pixels": limits.pixels,
            "files": limits.files,
            "seconds": limits.seconds,
        },
        "tlx": __version__,
    }


def _again(status: int) -> dict[str, str]:
    return {"retry-after": "1"} if status == 503 else {}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return LastWord({"error": error.why}, error.status, _again(error.status))


async def _gone(request: Request, error: Exception) -> Response:
    return Json({"error": "the client has gone"}, 499)  # which it does not read; it is counted


async def _other(request: Request, error: Exception) -> Response:
    """Of a path or method that there is not."""
    assert isinstance(error, HTTPException)
    return LastWord({"error": str(error.detail).lower()}, error.status_code, dict(error.headers or {}))


async def _fault(request: Request, error: Exception) -> Response:
    """uvicorn logs it with its trace, here; the client is told no more than that."""
    return LastWord({"error": "a fault of the server, which it has logged"}, 500)


def _counted(app: Asgi, service: Service) -> Asgi:
    async def counted(scope: Any, receive: Receive, send: Send) -> None:
        route = scope.get("path") if scope.get("path") in _ROUTES else "other"
        waits = (b"expect", b"100-continue") in scope.get("headers", ())
        scope["tlx.body"] = _Body.WAITS if waits else _Body.COMES

        async def received() -> Message:
            scope["tlx.body"] = _Body.COMES
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                scope["tlx.body"] = _Body.HAS_COME
            return message

        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                service.metrics.requests.labels(route, str(message["status"])).inc()
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            await app(scope, received, sent)
        except asyncio.CancelledError:
            if not service.is_stopping:
                raise
            if not begun:  # uvicorn's patience is over, and the process ends
                await LastWord({"error": "the server has stopped"}, 503)(
                    {**scope, "tlx.body": _Body.HAS_COME}, received, sent
                )

    return counted


def _page() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run, and nothing else come from anywhere."""
    page = _PAGE.read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    rules = (
        "default-src 'none'",
        f"script-src {sources('script')}",
        f"style-src {sources('style')}",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return page, "; ".join(rules)

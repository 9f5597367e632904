"""The web application of `ehr-embed serve`: its requests and answers, its refusals, and the numbers that it gives about itself.

The server writes no file and keeps nothing of a request but the vectors of new codes' texts, so there is no state that a request
could leave half-made. Messages and logs name keys, never values: these may be a patient's.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ehr_embed import __version__
from ehr_embed.core.errors import UserError
from ehr_embed.serving.answers import Answer, Answers
from ehr_embed.serving.microbatches import MicroBatches, QueueFullError
from ehr_embed.serving.records import GivenRequest, Record, read_request

log = logging.getLogger(__name__)
PATHS = ("/predict", "/health", "/metrics", "/openapi.json")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
MIB = 1 << 20
LARGE = 1 << 17
"""Bytes of a body above which it is parsed in another thread, so that other requests are read meanwhile."""


@dataclass(frozen=True)
class Limits:
    """Limits of the cost of a request; conf/serve.yaml explains each."""

    max_body_mib: float = 16.0
    max_records: int = 64
    max_events: int = 20_000
    max_attributed: int = 8
    max_batch: int = 64
    max_queued: int = 1024
    max_wait_ms: float = 0.0
    timeout_s: float = 30.0


class RefusedError(Exception):
    """A request that is not answered: a status, and the reason in a sentence."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Counts:
    """Numbers that Prometheus reads at /metrics."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        of = {"namespace": "ehr_embed", "registry": registry}
        self.requests = Counter("requests", "Requests that were answered", ["path", "status"], **of)  # type: ignore[arg-type]
        self.seconds = Histogram("request_seconds", "Seconds to an answer", ["path"], buckets=SECONDS, **of)  # type: ignore[arg-type]
        self.batches = Histogram("batch_records", "Records that were predicted for together", buckets=SIZES, **of)  # type: ignore[arg-type]
        self.records = Counter("records", "Records that were predicted for", **of)  # type: ignore[arg-type]
        self.events = Counter("events", "Events of these records", ["kind"], **of)  # type: ignore[arg-type]
        self.queued = Gauge("queued_records", "Records that wait", **of)  # type: ignore[arg-type]

    def add(self, answers: Sequence[Answer]) -> None:
        """Count the records of an answer and their events."""
        self.records.inc(len(answers))
        for answer in answers:
            for kind, n in answer["events"].items():
                self.events.labels(kind).inc(n)


def create_app(
    answers: Answers, *, run_name: str, limits: Limits | None = None, hosts: Sequence[str] | None = None
) -> FastAPI:
    """Return the application.

    Args:
        answers: of the run.
        run_name: what /health calls the run.
        limits: what a request may cost.
        hosts: names in the header Host under which it answers; None = any. This refuses a browser
            that a web page has pointed at this machine under another name.
    """
    limits, counts = limits or Limits(), Counts()
    batches = MicroBatches[Record, Answer](
        lambda records: answers.predict(records),
        max_batch=limits.max_batch,
        max_queued=limits.max_queued,
        max_wait_s=limits.max_wait_ms / 1000,
        tell=counts.batches.observe,
    )
    counts.queued.set_function(lambda: batches.n_queued)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batches.start()
        try:
            yield
        finally:
            await batches.close()

    app = FastAPI(title="ehr_embed", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, counts=counts, hosts=None if hosts is None else tuple(hosts))
    predictor = answers.predictor
    about = {
        "run": run_name,
        "classes": predictor.class_names,
        "has_exclusive_classes": predictor.has_exclusive_classes,
        "is_calibrated": predictor.calibrator is not None,
        "is_ensemble": answers.is_ensemble,
        "version": __version__,
    }

    @app.post("/predict", openapi_extra=_schema(), summary="Predict for one or several records")
    async def predict(request: Request) -> Any:
        try:
            async with asyncio.timeout(limits.timeout_s):
                body = await read_body(request, round(limits.max_body_mib * MIB))
                parse = asyncio.to_thread if len(body) > LARGE else _here
                given, records = await parse(_parsed, body, limits)
                found = await batches.submit(records)
                if given.attributions:
                    for record, answer in zip(records, found, strict=True):
                        answer["attributions"] = await batches.call(answers.attribute, record, given.target)
        except TimeoutError:
            raise RefusedError(
                504, f"no answer within {limits.timeout_s:g} s (timeout_s): send fewer records, or ask again later."
            ) from None
        except QueueFullError:
            told = f"{batches.n_queued} records wait already (max_queued={limits.max_queued}): ask again later."
            raise RefusedError(503, told, **{"Retry-After": "1"}) from None
        except UserError as error:
            raise RefusedError(422, str(error)) from None
        counts.add(found)
        return JSONResponse({"predictions": found, "is_calibrated": about["is_calibrated"]})

    @app.get("/health", summary="What is served, and whether it works")
    async def health() -> Any:
        is_well = batches.is_working
        return JSONResponse({"status": "ok" if is_well else "not working", **about}, 200 if is_well else 503)

    @app.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(counts.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse({"error": error.reason}, error.status, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; so nginx counts a client that closed the connection

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException | HTTPException)
        told = f"{request.method} {request.url.path[:80]}: {error.detail}. There are POST /predict, GET /health and GET /metrics."
        return JSONResponse({"error": told}, error.status_code, headers=error.headers)

    return app


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request, of which no more is read than is allowed.

    Raises:
        RefusedError: it is larger, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"expected the content type application/json, got {kind[:80] or 'none'}.")
    too_large = RefusedError(
        413,
        f"the body is larger than {max_bytes / MIB:g} MiB (max_body_mib): send fewer records, or their last events only.",
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _parsed(body: bytes, limits: Limits) -> tuple[GivenRequest, list[Record]]:
    """Return a request and its records.

    Raises:
        UserError: it is no such request, or asks for too much.
    """
    given, records = read_request(body, max_records=limits.max_records, max_events=limits.max_events)
    if given.attributions and len(records) > limits.max_attributed:
        raise UserError(
            f"attributions: expected at most {limits.max_attributed} records with them (max_attributed), got {len(records)}."
        )
    return given, records


async def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, called in this thread."""
    return function(*arguments)


def _schema() -> dict[str, Any]:
    """Return what /openapi.json says of the body, which the application reads itself."""
    schema = GivenRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return whole(inner[node["$ref"].rpartition("/")[2]])
            return {key: whole(value) for key, value in node.items()}
        return [whole(item) for item in node] if isinstance(node, list) else node

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole(schema)}}}}


class Guard:
    """Middleware: refuse foreign host names, count and time every request, and answer an unforeseen error in a sentence.

    Args:
        app: the application inside.
        counts: what is counted.
        hosts: as in `create_app`.
    """

    def __init__(self, app: ASGIApp, *, counts: Counts, hosts: tuple[str, ...] | None) -> None:
        self.app, self._counts, self._hosts = app, counts, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        began, status = time.perf_counter(), 500
        is_begun = False

        async def counted(message: Message) -> None:
            nonlocal status, is_begun
            if message["type"] == "http.response.start":
                status, is_begun = message["status"], True
            await send(message)

        try:
            if (told := self._foreign(scope)) is not None:
                await JSONResponse({"error": told}, 421)(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Exception as error:
            # The message of an error may hold a value of a record, so that its kind and place are logged alone.
            log.error("%s at %s", type(error).__name__, " ".join(traceback.format_tb(error.__traceback__)[-3:]))
            if not is_begun:
                told = "the server failed at this request; its log says where. Other requests are answered."
                await JSONResponse({"error": told}, 500)(scope, receive, counted)
        finally:
            self._counts.requests.labels(path, str(status)).inc()
            self._counts.seconds.labels(path).observe(time.perf_counter() - began)

    def _foreign(self, scope: Scope) -> str | None:
        """Return why a request's host name is refused, None where it is not."""
        if self._hosts is None:
            return None
        header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
        if name.lower() in self._hosts:
            return None
        return f"this server answers under the names {', '.join(self._hosts)} (allowed_hosts), and was asked under another one."

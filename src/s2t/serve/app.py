"""The routes: what a request asks for, handed to the service, and errors in the OpenAI shape."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from s2t import __version__
from s2t.serve import schema
from s2t.serve.answers import ChatWriter, TextWriter, Writer
from s2t.serve.edge import ARRIVED, ASSETS, Edge
from s2t.serve.errors import ApiError, error_body, invalid
from s2t.serve.intake import Plan
from s2t.serve.respond import Limit, first_of, gone, respond
from s2t.serve.service import Service
from s2t.web import source

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request asks for what cannot be done; `param` says where."},
    401: {"description": "The key is missing or wrong."},
    403: {"description": "The request names another host than this machine, which alone is served without a key."},
    404: {"description": "There is no such model."},
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is too large."},
    429: {"description": "The queue is full; `Retry-After` says when to try again."},
    500: {"description": "The engine failed."},
    502: {"description": "The servers that run the model refuse the request."},
    503: {"description": "The server is stopping, or the servers that run the model do not answer."},
    504: {"description": "The answer took too long."},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
PAGE = Path(__file__).parent / "page"
_KINDS = {".css": "text/css", ".js": "text/javascript"}


def create_app(service: Service, key: str | None) -> FastAPI:
    """The application around a service; it starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="s2t",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    _add_api(app, service)
    _add_info(app, service)
    _add_page(app)
    _name_models(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}

    def observe(path: str, status: int, seconds: float) -> None:
        known = path if path in paths else "other"
        service.metrics.requests.labels(known, str(status)).inc()
        service.metrics.seconds.labels(known).observe(seconds)

    config = service.config
    app.add_middleware(Edge, key=key, host=config.host, max_body_bytes=config.max_body_bytes, observe=observe)
    return app


def _name_models(app: FastAPI, service: Service) -> None:
    """Say in the OpenAPI schema which models and strategies there are."""
    found = app.openapi()  # made once, and kept by the application
    parts = found["components"]["schemas"]
    for body in ("ChatBody", "CompletionBody"):
        parts[body]["properties"]["model"]["enum"] = service.intake.models
    parts["Extension"]["properties"]["strategy"] = {"enum": [*service.intake.strategies, None]}
    [name] = found["paths"]["/v1/models/{name}"]["get"]["parameters"]
    name["schema"]["enum"] = service.intake.models


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {**_ERRORS[status], "model": schema.ErrorBody} for status in statuses}


def _add_api(app: FastAPI, service: Service) -> None:
    async def run(make: Callable[[Any], Plan], body: Any, writer: type[Writer], request: Request) -> Response:
        limit = Limit(service.config.request_timeout_s, request.scope.get(ARRIVED))
        answer = await first_of(service.answer(make, body, writer), request.receive, limit)
        return gone() if answer is None else await respond(answer, request, limit)

    failures = _errors(400, 401, 403, 404, 408, 413, 429, 500, 502, 503, 504)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": schema.ChatAnswer, "content": _STREAM}, **failures},
    )
    async def chat(body: schema.ChatBody, request: Request) -> Response:
        """Answer a chat."""
        return await run(service.intake.chat, body, ChatWriter, request)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": schema.TextAnswer, "content": _STREAM}, **failures},
    )
    async def completions(body: schema.CompletionBody, request: Request) -> Response:
        """Continue prompts of text or of token ids."""
        return await run(service.intake.completion, body, TextWriter, request)


def _add_info(app: FastAPI, service: Service) -> None:
    created = int(time.time())
    told = service.intake.engine

    def entry(name: str) -> schema.ModelEntry:
        own: schema.ModelEntry = {"id": name, "object": "model", "created": created, "owned_by": "s2t"}
        if told is not None:
            own["engine"] = told
        return own

    @app.get("/v1/models", responses=_errors(401))
    async def models() -> schema.ModelList:
        """The model, as itself and under each strategy."""
        return {"object": "list", "data": [entry(name) for name in service.intake.models]}

    @app.get("/v1/models/{name:path}", responses=_errors(401, 404))
    async def model(name: str) -> schema.ModelEntry:
        """One of the models."""
        if name not in service.intake.models:
            raise ApiError(404, "this model is not served; see /v1/models.", "model", "model_not_found")
        return entry(name)

    @app.get("/health", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def health() -> Response:
        """Whether the server takes requests."""
        status = await service.health()
        body = {"status": status, "running": service.num_running, "waiting": service.num_waiting}
        return JSONResponse(body, 200 if status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **_errors(401)}, response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    own = {name: (PAGE / name).read_bytes() for name in ("playground.html", "playground.css", "playground.js")}
    files = own | {name: source(name).encode() for name in ("tokens.css", "tokens.js")}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["playground.html"], media_type="text/html; charset=utf-8")

    @app.get(ASSETS + "{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        kind = _KINDS.get(Path(name).suffix)
        if kind is None or name not in files:
            raise ApiError(404, "there is no such file.")
        return Response(files[name], media_type=f"{kind}; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def api_error(request: Request, error: Any) -> Response:
        return answer(error)

    async def invalid_body(request: Request, error: Any) -> Response:
        return answer(invalid(error.errors()))

    async def http_error(request: Request, error: Any) -> Response:
        text = {404: "there is no such path", 405: "this path does not take that method"}
        message = text.get(error.status_code, "the body cannot be read as JSON")
        return JSONResponse(error_body(error.status_code, f"{message}."), error.status_code, headers=error.headers)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http_error)

"""The page, and what it asks of an explorer, over HTTP."""

import ipaddress
import math
from collections.abc import Awaitable, Callable, Set
from http import HTTPStatus
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response

from vae_dist.config import ImagesLost, InputError
from vae_dist.explore.explorer import Explorer

_MOST_BYTES = 20_000_000  # of a request
_MOST_SEED = 2**63 - 1
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/live.js": "live.js", "/pad.js": "pad.js"}
_HEADERS = {  # of every answer
    "Cache-Control": "no-cache",  # a newer version of this package may serve the same address
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def build_app(explorer: Explorer, names: Set[str]) -> FastAPI:
    """The application. `names` are the host names, besides any plain address, under which it may be asked."""
    app = FastAPI(openapi_url=None)  # nor the pages of documentation, which would ask other hosts for their scripts

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _turned_away(request, names) or await answer(request)
        response.headers.update(_HEADERS | {"X-Model": explorer.mark})  # by which an open page knows its own model
        return response

    wanted = _wanted(explorer)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, _: Exception) -> Response:  # FastAPI's own answer repeats the input, in pydantic's words
        return _words(HTTPStatus.UNPROCESSABLE_ENTITY, wanted[request.url.path])

    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(ImagesLost, _lost)
    for path, name in _FILES.items():
        app.get(path)(_sender(name))
    _add_questions(app, explorer)
    return app


def _add_questions(app: FastAPI, explorer: Explorer) -> None:
    """What the page asks. These are no coroutines, so each has a thread of its own while it waits for the model."""
    dim, (channels, height, width) = explorer.model.latent_dim, explorer.model.image_shape
    size, raw = channels * height * width, "application/octet-stream"

    @app.get("/model")
    def model() -> JSONResponse:
        return JSONResponse(explorer.facts() | {"most_bytes": _MOST_BYTES})

    @app.post("/decode")
    def decode(latents: Annotated[list[float], Body(embed=True, min_length=dim, max_length=dim)]) -> JSONResponse:
        return JSONResponse(explorer.decode(latents))

    @app.get("/sample")
    def sample(seed: Annotated[int, Query(ge=0, le=_MOST_SEED)]) -> JSONResponse:
        return JSONResponse(explorer.sample(seed))

    @app.post("/encode")
    def encode(pixels: Annotated[bytes, Body(media_type=raw, min_length=size, max_length=size)]) -> JSONResponse:
        return JSONResponse(explorer.encode(pixels))

    @app.post("/upload")
    def upload(file: Annotated[bytes, Body(media_type=raw)]) -> JSONResponse:
        return JSONResponse(explorer.upload(file))

    @app.get("/image")
    def image(number: int) -> JSONResponse:
        return JSONResponse(explorer.image(number))


def _wanted(explorer: Explorer) -> dict[str, str]:
    """What is said where a question has not what it takes, by its path."""
    return {
        "/decode": f"latents: they must be {explorer.model.latent_dim} numbers",
        "/sample": f"seed: it must be a whole number in 0 … {_MOST_SEED}",
        "/encode": f"pixels: they must be {math.prod(explorer.model.image_shape)} bytes",
        "/upload": "the picture file is empty",
        "/image": "number: it must be a whole number, that of a test image",
    }


def _sender(name: str) -> Callable[[], FileResponse]:
    """The answer to whoever asks for a file of the page."""
    return lambda: FileResponse(Path(__file__).parent / name)


def _turned_away(request: Request, names: Set[str]) -> Response | None:
    """The answer to what this very page would not ask, or not so much of at once; None to all else.

    Foreign pages in the same browser are known by the Origin that browsers add where they send something; and those whose own
    host name was turned to this machine's address (DNS rebinding), by the Host.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if not _is_own(host, names):
        return _words(
            HTTPStatus.BAD_REQUEST, f"{host!r} is no name of this server: use its address, or start it with --host NAME"
        )
    if origin is not None and origin.partition("://")[2] != host:
        return _words(HTTPStatus.FORBIDDEN, f"a page of {origin} may not ask this server")
    if "transfer-encoding" in request.headers:
        return _words(HTTPStatus.LENGTH_REQUIRED, "say how long it is")
    if int(request.headers.get("content-length", 0)) > _MOST_BYTES:
        return _words(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_MOST_BYTES // 10**6} MB")
    return None


def _is_own(host: str, names: Set[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _refused(_: Request, error: Exception) -> Response:
    return _words(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))


def _lost(_: Request, error: Exception) -> Response:
    return _words(HTTPStatus.SERVICE_UNAVAILABLE, str(error))


def _words(status: HTTPStatus, words: str) -> Response:
    return JSONResponse({"detail": words}, status)

"""Errors of a request, in the OpenAI shape; no traceback and nothing of the request's own text leaves the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2t.serve.schema import UNSUPPORTED, ErrorBody

INVALID, AUTH, LIMIT, SERVER = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
_TYPES = {401: AUTH, 429: LIMIT}
_TEXTS = {
    "extra_forbidden": "is not a parameter of this server; leave it out",
    "missing": "is missing",
    "json_invalid": "is not valid JSON",
    "string_unicode": "holds a lone surrogate, which is no Unicode text",
}


class ApiError(Exception):
    """A request ends with this status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> ErrorBody:
        return error_body(self.status, self.message, self.param, self.code)


def stopping() -> ApiError:
    """The error of what comes, or is still there, when the server stops."""
    return ApiError(503, "the server is stopping.", code="stopping")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The OpenAI shape of an error."""
    kind = _TYPES.get(status, SERVER if status >= 500 else INVALID)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(found: Sequence[Any]) -> ApiError:
    """What is wrong with a body, from pydantic's list of errors: the first one, in words.

    Where a field may be of several kinds there is an error for each; the one about the value says more than those about the kind.
    """
    same = [error for error in found if error["loc"][:2] == found[0]["loc"][:2]]
    error = next((error for error in same if not error["type"].endswith("_type")), found[0])
    place = [part for part in error["loc"] if part != "body"]
    name = str(place[0]) if place and isinstance(place[0], str) else ""
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']}.")
    if not name:
        return ApiError(400, "the body must be a JSON object, sent as application/json.")
    if name in UNSUPPORTED and error["type"] != "extra_forbidden":
        return ApiError(400, f"{name} is not supported here; {UNSUPPORTED[name]}.", name, "unsupported_parameter")
    path = ".".join(str(part) for part in place if isinstance(part, int) or str(part).isidentifier())
    if name == "prompt":
        text, path = (
            "must be text, a list of texts, token ids, or a list of lists of token ids, none of them empty",
            name,
        )
    else:
        text = _TEXTS.get(error["type"], "is wrong: " + _lower_first(error["msg"]))
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}.get(error["type"], "invalid_value")
    return ApiError(400, f"{clipped(path)} {text}.", clipped(path), code)


def clipped(name: str) -> str:
    """A name that a client chose, short and printable."""
    shown = "".join(char if char.isprintable() else "?" for char in name[:80])
    return shown + ("..." if len(name) > 80 else "")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]

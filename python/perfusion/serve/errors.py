"""`ApiError`: what a client is told, in OpenAI's form. Every error of the server is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

__all__ = ["ApiError", "error_response", "field_at"]

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error",
    429: "rate_limit_error",
}  # fmt: skip


def field_at(place: Sequence[str | int]) -> str | None:
    """The field of a request that a validation error is about, by pydantic's `loc`, which also names members of unions."""
    return ".".join(str(part) for part in place if "-" not in str(part)) or None


class ApiError(Exception):
    """status: of HTTP. param: the field that is wrong. code: a word for programs. retry_after: seconds."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    # in ASCII: what a client sent may stand in it, and need not be text that UTF-8 can say
    return Response(json.dumps(error.body), error.status, headers, "application/json")

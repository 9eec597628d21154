"""Errors as OpenAI's clients expect them: one JSON shape, and the status that says whose mistake it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from compactor_vllm.errors import (
    CompactorError,
    EngineClosedError,
    InvalidInputError,
    MissingDependencyError,
    NoCalibrationError,
    UnknownMethodError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_TYPE = re.compile(r"str|int|constrained-\w+|[\w-]+\[.*\]|[A-Z]\w+")
"""What pydantic puts among the names of fields where a value may have several types."""


class ApiError(Exception):
    """A request that ends with an error.

    Args:
        status: of the response.
        message: for the client.
        param: field of the request that is wrong.
        code: a word that programs may compare.
        retry_after: seconds after which it may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def as_dict(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return error_response(self.status, self.as_dict(), headers)


def error_response(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: a message may quote text that UTF-8 cannot encode."""
    return Response(json.dumps(content), status, dict(headers or {}), "application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an exception of the engine's interface."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownMethodError):
        return ApiError(400, str(error), param="compression.method", code="unknown_method")
    if isinstance(error, NoCalibrationError):  # whose message may show where the model's files lie
        message = 'ratio "auto" needs a calibration of this model and method; who runs the server makes it: '
        command = "compactor-vllm calibrate --model MODEL --method METHOD"
        return ApiError(400, message + command, param="compression.ratio", code="no_calibration")
    if isinstance(error, InvalidInputError | MissingDependencyError):
        return ApiError(400, str(error))
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="engine_failed")
    if isinstance(error, CompactorError):
        return ApiError(500, str(error))
    return ApiError(500, "the server made a mistake; its log names the place", code="internal_error")


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The one message for what pydantic found; never quotes the input."""
    # Where several types are possible, each has its error; the one that got furthest is the one that was meant.
    worst = max(errors, key=lambda error: len(error["loc"]))
    context = worst.get("ctx") or {}
    parts, extra = list(worst["loc"][1:]), worst["type"] == "extra_forbidden"
    place = [
        str(part)
        for at, part in enumerate(parts, 1)
        if isinstance(part, int) or not _TYPE.fullmatch(part) or (extra and at == len(parts))
    ]
    if "field" in context:
        place.append(str(context["field"]))
    param = ".".join(place) or None
    if worst["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {context.get('error', 'it cannot be parsed')}", code="invalid_json"
        )
    if worst["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not a field that this server supports", param=param, code="unsupported")
    code = "unsupported" if worst["type"] == "unsupported" else "invalid_value"
    return ApiError(400, f"{param}: {worst['msg']}" if param else worst["msg"], param=param, code=code)

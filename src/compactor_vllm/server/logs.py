"""Log lines as text or JSON. Prompts, answers and keys are never among what is logged."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

logger = logging.getLogger("compactor_vllm.server")

FORMATS = ("text", "json")


class TextFormatter(logging.Formatter):
    """time level logger: message name=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None) or {}
        return " ".join([super().format(record), *(f"{name}={_short(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", None) or {}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def setup_logging(log_format: str, debug: bool = False) -> None:
    """Sends what this process logs to standard error, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(formatter))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("compactor_vllm").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def log_failure(error: BaseException, **fields: Any) -> None:
    """Notes where an exception came from. Its message is left out, because it may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    logger.error("a request failed", extra={"fields": {**fields, "error": type(error).__name__, "where": places}})

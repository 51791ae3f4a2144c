"""What $ATTNGEN_LOG asks for: attngen's loggers on stderr, as text or as one JSON object a line.

    ATTNGEN_LOG=info | debug | warning | ...[,json]

Without it attngen configures no logging: its records go to the loggers "attngen.*", for the program to take or leave.
Records carry their facts in the attribute ``facts`` (a dict), beside the sentence.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from .errors import ParameterError

_LEVELS = ("debug", "info", "warning", "error")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {
            "time": moment, "level": record.levelname.lower(), "logger": record.name, "process": os.getpid(),
            "message": record.getMessage(), **getattr(record, "facts", {}),
        }  # fmt: skip
        return json.dumps(line, default=str)


def configure(setting: str) -> None:
    """Send attngen's records to stderr as ``setting`` says. Raises ParameterError for one that it does not know."""
    level, _, form = setting.strip().lower().partition(",")
    if level not in _LEVELS or form not in ("", "json"):
        raise ParameterError(f"ATTNGEN_LOG={setting}: required {', '.join(_LEVELS)}, alone or with ,json as in info,json")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(_Json() if form else text)
    logger = logging.getLogger("attngen")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False

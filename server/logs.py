"""Log lines on standard error: for people, or as JSON for machines."""

from __future__ import annotations

import json
import logging
import logging.config
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class TextFormatter(logging.Formatter):
    """The message, then the other fields of the record as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        line, _, traceback = super().format(record).partition("\n")
        extra = {key: value for key, value in vars(record).items() if key not in STANDARD}
        line = " ".join([line, *(f"{key}={_shown(value)}" for key, value in extra.items())])
        return f"{line}\n{traceback}" if traceback else line


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() and " " not in value else json.dumps(value)


def configure_logging(log_format: LogFormat, level: str = "INFO") -> None:
    formatters = {
        "text": {"()": TextFormatter, "fmt": "%(asctime)s %(levelname)s %(message)s"},
        "json": {
            "()": JsonFormatter,
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
        },
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"chosen": formatters[log_format]},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
            "root": {"handlers": ["stderr"], "level": level},
            # uvicorn's own line for each request says less than ours.
            "loggers": {"uvicorn.access": {"level": "WARNING"}},
        }
    )

"""One JSON object a line on stderr for every log record of the process, uvicorn's included."""

import datetime
import logging
import math
import time

import orjson

from cerberus import printable, supervision
from cerberus.telemetry import repeats

_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
_ACCESS = "uvicorn.access"
_UVICORN = ("uvicorn", "uvicorn.error", _ACCESS, "uvicorn.asgi")
_QUIET_S, _SENTENCES = 60.0, 50


class JsonLines(logging.Formatter):
    """Formats a record as one line.

    Its fields: `time` (RFC 3339, UTC, ms), `level`, `logger`, `task` (which one logged it),
    `message`, then the fields of `extra`, such as `action`, a stable name for machines, and
    `traceback` or `stack` if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "task": supervision.current_task.get(),
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in _OWN and k not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            written = orjson.dumps(line, default=repr)
        except TypeError:  # a lone surrogate or an integer above 64 bits must not lose the line
            written = orjson.dumps({k: _encodable(v) for k, v in line.items()}, default=repr)
        return printable.escaped(written.decode())


class Lines(logging.Formatter):
    """Formats a record as text for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text, without its end."""
        return printable.lines(super().format(record))


class Repeated:
    """Logs a sentence, and not again while it recurs at least once a minute.

    Args:
        log: Where it is logged, as a warning.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._met_s: dict[str, float] = {}

    def warn(self, sentence: str, action: str) -> None:
        """Log a sentence, unless it occurred less than a minute ago."""
        now_s = time.monotonic()
        met_s = self._met_s.pop(sentence, -math.inf)
        if now_s - met_s > _QUIET_S:
            self._log.warning("%s", sentence, extra={"action": action})
        self._met_s[sentence] = now_s
        if len(self._met_s) > _SENTENCES:
            del self._met_s[next(iter(self._met_s))]


def _encodable(value: object) -> object:
    try:
        orjson.dumps(value, default=repr)
    except TypeError:
        return str(value).encode(errors="backslashreplace").decode()
    return value


def _without_query(record: logging.LogRecord) -> bool:
    """Cut the query off uvicorn's line about a request: it may hold a key."""
    if isinstance(record.args, tuple):
        cut = (a.partition("?")[0] if isinstance(a, str) else a for a in record.args)
        record.args = tuple(cut)
    return True


def configure(level: str) -> None:
    """Send all records to stderr, one line each; call this where the app is imported.

    uvicorn has set up its own loggers by then. They keep their level if it is stricter,
    `--no-access-log` stays in force, and no line has the query of a request.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
    """
    handler = repeats.Handler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h.formatter, JsonLines)]
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    logging.getLogger(_ACCESS).addFilter(_without_query)
    # At DEBUG it logs every request, and one contains the password.
    logging.getLogger("aiokafka.conn").setLevel(max(logging.INFO, root.level))
    for name in _UVICORN:
        logger = logging.getLogger(name)
        logger.propagate = logger.propagate or bool(logger.handlers)
        logger.handlers.clear()
        logger.setLevel(max(logger.level, root.level))

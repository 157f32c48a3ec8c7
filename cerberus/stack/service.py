"""Read the health and the logged warnings of the service in a child process."""

import http.client
import time
from collections.abc import Sequence

import orjson

from cerberus.stack import process

# How long a service may take to become ready once it answers.
_PATIENCE_S = 10.0
_CALM = ("DEBUG", "INFO")


class Health:
    """The health that the service reports.

    Args:
        port: Its port on 127.0.0.1.
        keys: Keys of callers; the first is used.

    Attributes:
        url: The address of the service.
        status: The last answer of /health; empty while there is none.
        reasons: Why the service is not ready.
    """

    def __init__(self, port: int, keys: Sequence[str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.status = ""
        self.reasons: list[str] = []
        self._port = port
        self._headers = dict(zip(("x-api-key",), keys, strict=False))
        self._next_s = 0.0
        self._answering_s: float | None = None

    def settled(self) -> bool:
        """Return whether it is ready or has answered for 10 s; asks every 0.2 s."""
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + 0.2
        if not self._answers():
            self._answering_s = None
            return False
        self._answering_s = self._answering_s or now
        return self.status == "ready" or now - self._answering_s > _PATIENCE_S

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2.0)
        try:
            connection.request("GET", "/health", headers=self._headers)
            answer = connection.getresponse()
            said = orjson.loads(answer.read())
            self.status, self.reasons = str(said["status"]), list(said.get("reasons", ()))
        except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError):
            return False
        finally:
            connection.close()
        return answer.status == http.HTTPStatus.OK


class Warnings:
    """Repeats the lines of a log at level WARNING and above on the terminal."""

    def __init__(self, service: process.Process, site: process.Site) -> None:
        self._log = service.log
        self._site = site
        self._offset = service.log_start

    def show(self) -> None:
        """Repeat new lines; an incomplete line waits."""
        with self._log.open("rb") as log:
            log.seek(self._offset)
            new = log.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            if text := _alarm(line):
                self._site.tell("service", text)


def _alarm(line: str) -> str:
    """Return the text of a line that warns, "" for JSON below WARNING and uvicorn's own INFO."""
    try:
        said = orjson.loads(line)
    except ValueError:
        return "" if line.startswith("INFO") else line
    if said["level"] in _CALM:
        return ""
    # Only the last line of a traceback; the log has the rest.
    *_, last = said["message"].strip().splitlines() or [""]
    return f"{said['level']} {said['task']}: {last}"

"""The service as production runs it: `uvicorn cerberus.app:app` in a process of its own."""

import contextlib
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

import httpx

ROOT = pathlib.Path(__file__).parent.parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Service:
    """One running service and a client of it."""

    def __init__(
        self,
        environ,
        *arguments,
        python=sys.executable,
        cwd=ROOT,
        app="cerberus.app:app",
        files=None,
    ):
        self.port = free_port()
        self.output = tempfile.TemporaryFile()  # a pipe that nobody reads would block it
        self.process = subprocess.Popen(
            [
                python,
                "-m",
                "uvicorn",
                app,
                "--port",
                str(self.port),
                *arguments,
            ],
            env={k: v for k, v in os.environ.items() if k != "CI"} | environ,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=files
            and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))),
        )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=10,
            limits=httpx.Limits(max_keepalive_connections=0),  # any worker may answer
        )

    def predict(self, user_id, **more):
        return self.http.post("/predict", json={"user_id": user_id} | more)

    def health(self):
        """Return the health document, or None while nothing answers."""
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").json()
        return None

    def wait(self, condition, what, seconds=60):
        """Wait until `condition()` holds; a process that ends meanwhile is a failure."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if found := condition():
                return found
            assert self.process.poll() is None, self.written()
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {what}; health: {self.health()}")

    def wait_until_ready(self):
        return self.wait(
            lambda: (h := self.health()) and h["status"] == "ready" and h, "the service is ready"
        )

    def end(self, number=signal.SIGTERM):
        """End it and return its exit status and what it wrote."""
        self.http.close()
        self.process.send_signal(number)
        return self.process.wait(timeout=40), self.written()

    def written(self):
        """Return all that it wrote."""
        # Its own writes go where our reading would have left the file.
        return os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0).decode()


@contextlib.contextmanager
def service(environ, *arguments, **where):
    """Run a service; at the end it is killed, with its workers, if it still runs."""
    running = Service(environ, *arguments, **where)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait(timeout=10)
        running.http.close()
        running.output.close()

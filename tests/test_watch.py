"""`make run` names servers that die and starts them again."""

import contextlib
import os
import re
import signal
import time

import psutil
import pytest
from test_stack import only, processes_in, read_and_write, started

from cerberus.stack import watch

pytestmark = pytest.mark.servers


def until(condition, what, within_s=90):
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


def main_process(directory, name):
    return int((directory / f"{name}.pid").read_text())


def kill(directory, name):
    """Kill a server's main process alone, as the system does when memory is short."""
    pid = main_process(directory, name)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("name", ["kafka", "redis", "postgres"])
def test_a_server_that_dies_is_named_and_started_again_with_its_data(name, new_directory, machine):
    directory = new_directory()
    with started(directory, machine, durable=False) as (servers, said):
        first = servers.environ
        read_and_write(servers, "one")
        with servers.watch() as watching:
            del said[:]
            pid = kill(directory, name)
            until(lambda: any("ready in" in line for line in said), "it runs again")
            assert watching.failure is None
            assert main_process(directory, name) != pid
            assert servers.environ == first
            kept = read_and_write(servers, "two")
            assert [b"one", "one", ["one"]] == kept[:3]
        [told] = [line for line in said if "starting it again" in line]
        assert re.search(rf"{name} +was ended by SIGKILL; starting it again \(1 of 3\)", told)
    assert not processes_in(directory)


def test_after_three_new_starts_the_next_death_is_the_end_with_the_last_lines(
    new_directory, machine
):
    directory = new_directory()
    with started(directory, only("redis", machine), durable=False) as (servers, said):
        with servers.watch() as watching:
            for number in range(1, watch.TIMES + 2):
                until(lambda: watching.failure or not _dead(directory), "it runs")
                kill(directory, "redis")
                if number <= watch.TIMES:
                    until(lambda n=number: again(said) == n, "it runs again")
            failure = until(lambda: watching.failure, "it is given up")
        assert f"({watch.TIMES} of {watch.TIMES})" in "\n".join(said)
        assert "started again 3 times within 10 minutes" in str(failure)
        assert "was ended by SIGKILL" in str(failure)
        assert "Ready to accept connections" in str(failure)


def test_a_server_that_cannot_start_again_is_the_end_too(new_directory, machine):
    directory = new_directory()
    with started(directory, only("redis", machine), durable=False) as (servers, said):
        with servers.watch() as watching:
            broken = directory / "redis" / "appendonlydir"
            for file in broken.glob("*.aof"):
                file.write_bytes(b"not a log of Redis")
            if not broken.exists():
                (directory / "redis" / "appendonly.aof").write_bytes(b"not a log of Redis")
            kill(directory, "redis")
            failure = until(lambda: watching.failure, "it is given up")
        assert "redis ended with status 1" in str(failure)
        assert len([line for line in said if "starting it again" in line]) == watch.TIMES


def test_the_end_of_the_watch_leaves_nothing_that_was_about_to_start(new_directory, machine):
    directory = new_directory()
    with started(directory, only("kafka", machine), durable=False) as (servers, said):
        with servers.watch():
            kill(directory, "kafka")
            until(lambda: any("starting it again" in line for line in said), "it is noticed")
            time.sleep(watch._PAUSE_S + 0.5)
    assert not processes_in(directory)


def again(said):
    """Return how many times a restarted server was reported."""
    return sum("ready in" in line for line in said) - 1


def _dead(directory):
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        return psutil.Process(main_process(directory, "redis")).status() == "zombie"
    return True

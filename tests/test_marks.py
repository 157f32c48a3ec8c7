"""What a test needs is known before it runs, so that `make quick` can leave out what is slow."""

import subprocess

import pytest
from conftest import SERVERS


@pytest.mark.parametrize("program", sorted(SERVERS))
def test_without_the_mark_no_server_is_started(program, tmp_path):
    stand_in = tmp_path / program
    stand_in.symlink_to("/bin/true")
    with pytest.raises(RuntimeError, match="without the mark `servers`"):
        subprocess.run([stand_in], check=True)
    subprocess.run([stand_in, "--version"], check=True)


@pytest.mark.servers
def test_with_the_mark_it_is(tmp_path):
    stand_in = tmp_path / "redis-server"
    stand_in.symlink_to("/bin/true")
    subprocess.run([stand_in], check=True)

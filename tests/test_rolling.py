"""A roll-out beside an older commit, in a minute; and that the harness sees what breaks one."""

import contextlib

import pytest

from cerberus import errors
from chaos import cluster, releases, rolling, rollout

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
# What a new version might write that the one before it cannot read, and how that shows.
# It finds the classes by their methods, so that it does not matter in which module they are.
FIND = """
import sys
import orjson
from cerberus.app import app
def find(name, method):
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("cerberus.")]
    [found] = {vars(m)[name] for m in modules if hasattr(vars(m).get(name), method)}
    return found
"""
BREAKS = {
    "a claim with one value more": (
        """
record = find("Record", "pack")
pack = record.pack
record.pack = lambda self, *version: orjson.dumps([*orjson.loads(pack(self, 0)), None])
""",
        "answered 500",
    ),
    "a commit with one number more": (
        """
commit = find("Commit", "metadata")
write, read = commit.metadata, commit.read
commit.metadata = lambda self, cluster, *version: write(self, cluster, 0) + " 1"
commit.read = lambda offset, text, cluster: read(offset, text.removesuffix(" 1"), cluster)
""",
        "from offset 0, but",
    ),
}


@pytest.fixture(scope="module")
def old_tree():
    """Check the older commit out beside this tree."""
    if not releases.known(rolling.OLD):
        pytest.skip(f"the history here has no commit {rolling.OLD}")
    with releases.checkout(rolling.OLD) as tree:
        yield tree


@contextlib.asynccontextmanager
async def opened(servers, environ, directory, old_tree, plan, changes=""):
    old = releases.Release("old", old_tree)
    new = releases.Release("new", releases.HERE, changes)
    async with rollout.opened(servers, environ, directory, (old, new), plan) as group:
        yield group


@pytest.mark.servers
async def test_an_older_version_is_replaced_unseen_and_may_come_back(
    servers, environ, new_directory, old_tree
):
    plan = rollout.Plan(4_000, rounds=1, hold_s=1.5, seed=11)
    async with opened(servers, environ, new_directory(), old_tree, plan) as group:
        told = await rolling.run(group, print)
    assert told.differences == []
    assert told.counts["answers exact"] > 500
    assert told.counts["records"] == plan.events


@pytest.mark.servers
@pytest.mark.parametrize("change", BREAKS)
async def test_what_the_older_version_cannot_read_is_found(
    servers, environ, new_directory, old_tree, change
):
    plan = rollout.Plan(2_000, rounds=1, hold_s=1.0, seed=5, back=False)
    changes, sign = BREAKS[change]
    async with opened(servers, environ, new_directory(), old_tree, plan, FIND + changes) as group:
        told = await rolling.run(group, print)
    assert any(sign in line for line in told.wrong), told.wrong


async def test_code_that_is_not_the_release_s_is_found(machine, new_directory, old_tree):
    one = releases.Release("old", releases.HERE).instance(0, new_directory(), machine)
    one.start()
    # Without settings it ends, once its code is imported.
    await cluster.until(lambda: one.status is not None, "it has ended", 60)
    assert releases.impostor(one) is None
    one.tree = old_tree
    assert f"not {old_tree}" in str(releases.impostor(one))


def test_a_commit_that_the_history_lacks_is_named():
    missing = pytest.raises(errors.CerberusError, match="has no commit 0000000")
    with missing, releases.checkout("0000000"):
        pass

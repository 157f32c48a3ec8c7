"""The package as others get it: a wheel in an environment of its own, away from any checkout."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from service import ROOT, service

from cerberus import environment
from cerberus.jobs import feast as feast_store

SHIPPED = ("cerberus", "feature_repo", "models", "pyproject.toml", "README.md", "LICENSE")
SECRET = "feature_store.yaml"
BESIDE, WITHIN = "checkout", "installed"


def run(command, cwd, environ=os.environ):
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(new_directory):
    """Build both archives from a copy that git does not know and that a user has rendered into."""
    tree = new_directory()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    (tree / "feature_repo" / SECRET).write_text("password: secret\n")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"], tree)
    [wheel], [sdist] = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    return wheel, sdist


class Installation:
    """A fresh environment with the wheel in it; the requirements are those of the running one."""

    def __init__(self, directory, wheel):
        self.cwd = directory / "empty"
        self.cwd.mkdir()
        venv.create(directory / "venv", symlinks=True)
        self.python = str(directory / "venv" / "bin" / "python")
        [self.library] = (directory / "venv").glob("lib/python*/site-packages")
        paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        (self.library / "requirements.pth").write_text("\n".join(paths))
        pip = ["-m", "pip", "--python", self.python, "install", "--no-deps", "--no-index"]
        run([sys.executable, *pip, wheel], self.cwd)
        self.package = self.library / "cerberus"

    def files(self):
        """Return what is in the package, but for what Python compiles."""
        found = self.package.rglob("*")
        return {path for path in found if path.is_file() and "__pycache__" not in path.parts}

    def command(self, environ, *arguments):
        """Run a command with no more in the environment than it needs."""
        return run([self.python, "-m", "cerberus", *arguments], self.cwd, environ)


@pytest.fixture(scope="module")
def installed(new_directory, built):
    return Installation(new_directory(), built[0])


def test_passwords_enter_neither_archive(built):
    wheel, sdist = built
    names = [*zipfile.ZipFile(wheel).namelist(), *tarfile.open(sdist).getnames()]
    assert sum(name.endswith("feature_repo/features.py") for name in names) == 2
    assert not [name for name in names if SECRET in name]


def test_the_wheel_has_every_file_that_the_package_reads(installed):
    def those(root):
        found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return {path for path in found if path.suffix not in (".pyc", ".yaml")}

    wanted = those(ROOT / "cerberus")
    for name in ("feature_repo", "models"):
        wanted |= {pathlib.Path(name) / path for path in those(ROOT / name)}
    assert those(installed.package) == wanted - {pathlib.Path("models/train_model.py")}


@pytest.mark.parametrize("place", [BESIDE, WITHIN])
def test_what_comes_with_the_package_is_found_beside_it_or_inside(tmp_path, place):
    package = tmp_path / "cerberus"
    wanted = (tmp_path if place == BESIDE else package) / "models"
    wanted.mkdir(parents=True)
    assert environment.shipped("models", package) == wanted


def test_an_installation_is_never_rendered_into_and_a_checkout_is(monkeypatch, tmp_path):
    assert feast_store.place() == ROOT / "feature_repo"
    monkeypatch.setattr(feast_store, "REPO", environment.PACKAGE / "feature_repo")
    assert feast_store.place() is None


@pytest.mark.timeout(400)  # Feast is imported seven times, each in some seconds
def test_an_installed_wheel_serves_with_three_addresses_from_an_empty_directory(installed, environ):
    before = installed.files()
    addresses = {name: environ[name] for name in ("KAFKA_BROKER", "REDIS_URL", "DATABASE_URL")}
    # The prefix keeps this test's topics apart; an empty path shuts the checkout out.
    world = {**addresses, "KAFKA_PREFIX": environ["KAFKA_PREFIX"], "PYTHONPATH": ""}
    world["CERBERUS_OPEN"] = "loopback"
    where = run(
        [installed.python, "-c", "import cerberus; print(cerberus.__file__)"], installed.cwd, world
    )
    assert pathlib.Path(where.strip()).is_relative_to(installed.package)
    with service(world, python=installed.python, cwd=installed.cwd) as running:
        running.wait_until_ready()
        # Nobody has applied the definitions: the service does it before it loads credit scores.
        running.wait(lambda: '"materialized"' in running.written(), "scores are loaded", 150)
        answer = running.predict(1005)
        assert answer.status_code == 200
        wanted = {"user_id", "prediction", "probability", "features", "latency_stats"}
        assert wanted <= answer.json().keys()
        assert answer.json()["features"]["credit_score"] is not None
        installed.command(world, "inspect", "1005")
        status, written = running.end()
        assert status in (0, -signal.SIGTERM, 128 + signal.SIGTERM), written
    for arguments in (["migrate"], ["features", "apply"], ["materialize"], ["train", "--help"]):
        installed.command(world, *arguments)
    installed.command(world, "replay", "--verify")
    assert installed.files() == before
    assert list(installed.cwd.iterdir()) == []
    rendered = installed.command(world, "features", "render")
    assert rendered.split()[0] == str(installed.cwd / SECRET)

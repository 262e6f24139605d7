"""A real engine and a real image: an engine is started where none runs, the base comes from debootstrap, not a registry."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.host.engines import LOCK_LABEL, find_image
from tests.imports import ROOT
from tests.pipeline.test_launcher import change, clone  # noqa: F401

BASE = "mathmind-test-base:bookworm"
SUITE, ARCHIVE = "bookworm", "http://deb.debian.org/debian"
PLANTED = "planted-while-building"
CERTIFICATES = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))


def pytest_addoption(parser):
    parser.addoption("--engine", action="append", help="docker or podman, repeatable; default: docker")


def pytest_generate_tests(metafunc):
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", metafunc.config.getoption("--engine") or ["docker"], indirect=True, scope="session")


def cannot(reason: str):
    """Without an engine a laptop skips these tests; CI must not."""
    if os.environ.get("CI"):
        pytest.fail(f"CI has no container engine: {reason}", pytrace=False)
    pytest.skip(reason)


def answers(engine: str) -> bool:
    return subprocess.run([engine, "info"], capture_output=True).returncode == 0


def start_dockerd() -> subprocess.Popen:
    daemon = subprocess.Popen(["dockerd"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not answers("docker"):
        if daemon.poll() is not None or time.monotonic() > deadline:
            cannot("dockerd does not start")
        time.sleep(0.2)
    return daemon


@pytest.fixture(scope="session")
def engine(request):
    """The name of an engine that answers."""
    name, daemon = request.param, None
    if not shutil.which(name):
        cannot(f"{name} is not installed")
    if not answers(name):
        if name != "docker" or os.getuid() or not shutil.which("dockerd"):
            cannot(f"{name} does not answer, and no test can start it")
        daemon = start_dockerd()
    yield name
    if daemon:
        daemon.terminate()
        daemon.wait()


@pytest.fixture(scope="session")
def image(engine, tmp_path_factory) -> str:
    """docker/build's own cpu image, on a base that debootstrap made; its id. Built once for as long as the recipe holds."""
    found = find_image(shutil.which(engine), ROOT, "cpu")
    if found is None:
        if subprocess.run([engine, "image", "inspect", BASE], capture_output=True).returncode:
            make_base(engine, tmp_path_factory.mktemp("base") / "root")
        command = ["docker/build", "cpu", "--engine", engine, "--base", BASE, "--network", "host"]
        if CERTIFICATES.is_file():
            trusted = tmp_path_factory.mktemp("trusted") / "ca.pem"
            trusted.write_text(CERTIFICATES.read_text() + f"# {PLANTED}\n")
            command += ["--ca", str(trusted)]
        environment = {**os.environ, "MATHMIND_PYTHON": sys.executable, "HF_TOKEN": PLANTED, "WANDB_API_KEY": PLANTED}
        built = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert PLANTED not in built.stdout
        assert built.returncode == 0, built.stdout[-4000:]
        found = find_image(shutil.which(engine), ROOT, "cpu")
    return found["Id"]


def make_base(engine: str, root: Path) -> None:
    """Debian with Python and a compiler, imported as an image."""
    if os.getuid() or not shutil.which("debootstrap"):
        cannot("a base image takes root and debootstrap")
    packages = "ca-certificates,g++,python3,python3-venv,python3-dev"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, root, ARCHIVE],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    packed = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
    subprocess.run([engine, "import", "-", BASE], stdin=packed.stdout, check=True, stdout=subprocess.DEVNULL)
    assert packed.wait() == 0


@pytest.fixture
def contained(clone, engine, image):  # noqa: F811
    """A clone, in a path with spaces, whose stages run in containers."""
    change(clone, run__engine=engine)
    yield clone
    for container in containers(engine, clone):  # a failed test's: the next one shall not stumble over it
        subprocess.run([engine, "rm", "--force", container], capture_output=True)


def containers(engine: str, folder: Path) -> list[str]:
    """The containers of a clone's stages, whatever their state; those of the user's own runs are none of ours."""
    listed = subprocess.run([engine, "ps", "--all", "--quiet", "--filter", f"label={LOCK_LABEL}"], capture_output=True, text=True)
    lock = f'{{{{.Id}}}} {{{{index .Config.Labels "{LOCK_LABEL}"}}}}'
    asked = subprocess.run([engine, "inspect", "--format", lock, *listed.stdout.split()], capture_output=True, text=True)
    found = [line.split(" ", 1) for line in asked.stdout.splitlines()]
    return [container for container, lock in found if lock.startswith(str(folder.parent))]

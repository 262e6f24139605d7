"""docker/lock with the real uv, on packages made here: nothing moves that was not asked to, and what moved is said."""

import subprocess
import sys
import zipfile

import pytest

from stages.host.locks import versions, with_hashes_of_every_python
from tests.imports import ROOT

LOCKS = ("cpu", "export", "train", "rollout", "host", "tools", "uv")


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A folder docker/ whose `tools` needs package `alpha`, which needs `beta`; returns a function that runs docker/lock."""
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/tools.in").write_text("alpha\n", encoding="utf-8")
    (tmp_path / "docker/torch_source").symlink_to(ROOT / "docker/torch_source")

    def run(*arguments):
        command = [sys.executable, "-m", "stages.host.locks", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    publish(tmp_path, "alpha", "1.0", "beta")
    publish(tmp_path, "beta", "1.0")
    return run


def publish(folder, name, version, needs=None):
    """Puts an empty wheel where uv looks."""
    about = f"{name}-{version}.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"wheels/{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_a_new_lock_says_what_came_and_pins_it_by_hash(lock, tmp_path):
    done = lock("tools")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["docker/tools.lock: 2 packages, 2 moved", "  alpha (new) -> 1.0", "  beta (new) -> 1.0"]
    assert (tmp_path / "docker/tools.lock").read_text().count("--hash=sha256:") == 2


def test_a_package_moves_only_when_it_is_named(lock, tmp_path):
    lock("tools")
    publish(tmp_path, "alpha", "2.0")
    publish(tmp_path, "beta", "2.0")
    assert lock("tools").stdout == "docker/tools.lock: 2 packages, 0 moved\n"
    assert lock("tools", "--upgrade", "beta").stdout.splitlines() == ["docker/tools.lock: 2 packages, 1 moved", "  beta 1.0 -> 2.0"]
    moved = lock("tools", "--upgrade", "alpha").stdout.splitlines()
    assert moved == ["docker/tools.lock: 1 packages, 2 moved", "  alpha 1.0 -> 2.0", "  beta 2.0 -> (gone)"]


def test_what_does_not_resolve_is_told_and_the_lock_stays(lock, tmp_path):
    lock("tools")
    before = (tmp_path / "docker/tools.lock").read_bytes()
    (tmp_path / "docker/tools.in").write_text("alpha==9\n", encoding="utf-8")
    done = lock("tools")
    assert done.returncode == 1 and "docker/tools.in does not resolve" in done.stderr and "alpha==9" in done.stderr
    assert (tmp_path / "docker/tools.lock").read_bytes() == before


def test_a_lock_gets_the_hashes_of_every_pythons_torch():
    lock = "numpy==1 \\\n    --hash=sha256:aa\ntorch==2+cpu \\\n    --hash=sha256:bb\nzlib==3 \\\n    --hash=sha256:cc\n"
    direct = "torch==2+cpu \\\n    --hash=sha256:bb \\\n    --hash=sha256:dd\n"
    assert with_hashes_of_every_python(lock, direct) == lock.replace("sha256:bb\n", "sha256:bb \\\n    --hash=sha256:dd\n")
    assert with_hashes_of_every_python(lock, "numpy==1\n") == lock


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_every_lock_has_a_hash(lock):
    text = (ROOT / f"docker/{lock}.lock").read_text()
    assert versions(ROOT / f"docker/{lock}.lock")
    for requirement in text.replace("\\\n", " ").splitlines():
        assert requirement.startswith("#") or "--hash=sha256:" in requirement, requirement

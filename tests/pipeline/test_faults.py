"""What goes wrong around a stage, with DVC's own part in it: a clear error or the right result each time, never a wrong one."""

import os
import subprocess
import sys
import time

import pytest

from stages.host.cache import Cache
from stages.host.graph import hash_of, lock_outs, lock_stages
from stages.host.launcher import remove
from tests.pipeline.test_launcher import FETCH, change, copy_of, dvc, environment, git, repository_with_a_base, small_disk_works
from tests.pipeline.test_verify import verify

ROWS = "data/raw/test/rows.jsonl"
needs_mounts = pytest.mark.skipif(not small_disk_works(), reason="no file system can be mounted here")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return repository_with_a_base(tmp_path_factory.mktemp("faults") / "original", steps=3)


@pytest.fixture
def place(original, tmp_path):
    return copy_of(original, tmp_path / "place")


def assert_up_to_date(folder):
    done = dvc(folder, "status")
    assert "up to date" in done.stdout, done.stdout + done.stderr


def outs(folder):
    return lock_outs(lock_stages(folder))


def assert_as_locked(folder, *paths):
    """The bytes themselves, whatever DVC believes of them."""
    assert {path: hash_of(folder / path) for path in paths} == {path: outs(folder)[path] for path in paths}


def flip(path):
    """One bit as a disk flips it: size, time, inode and mode stay."""
    damage(path, lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:])


def cut(path):
    """A file as a power cut may leave it."""
    damage(path, lambda content: content[: len(content) // 2])


def rename(path):
    """A list of a folder's files in which one has another name."""
    damage(path, lambda content: content.replace(b"test/rows", b"tesu/rows"))


def damage(path, change_of):
    before = path.stat()
    path.chmod(0o644)
    content = change_of(path.read_bytes())
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def in_own_mounts(folder, script):
    """A shell script whose mounts nobody else sees and that go with it."""
    command = ["unshare", "-rm", "bash", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def read_only(folder):
    return f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && cd "$PWD"'


def test_of_two_repros_at_once_one_works_and_the_other_says_so(place):
    change(place, fetch__sources__pretraining__rows=30000)
    command = [sys.executable, "-m", "dvc", "repro", "fetch"]
    first = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.DEVNULL)
    while not list((place / ".dvc/tmp/mathmind/fetch").glob("*/outs/data/raw/*")) and first.poll() is None:
        time.sleep(0.01)
    second = dvc(place, "repro", "fetch")
    assert second.returncode != 0
    assert "data/raw' is busy, it is being blocked by" in second.stderr and str(first.pid) in second.stderr
    assert first.wait() == 0
    assert_as_locked(place, "data/raw")
    assert "didn't change, skipping" in dvc(place, "repro", "fetch").stdout


@needs_mounts
def test_a_cache_on_a_full_disk_is_said_and_keeps_no_file_under_a_wrong_name(place):
    """DVC goes on: what the stage made is whole in the tree, and is made and kept again when there is room."""
    done = in_own_mounts(place, """
        mount -t tmpfs -o size=300k none .dvc/cache && python -m dvc repro fetch && cp -a .dvc/cache full
        mount -o remount,size=50m none .dvc/cache && python -m dvc repro fetch && cp -a .dvc/cache mended
        python -m dvc status fetch
    """)  # fmt: skip
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "up to date" in done.stdout.splitlines()[-1]
    assert_as_locked(place, "data/raw")
    known = set(Cache(place).parts(outs(place)["data/raw"]).values())
    for folder, wanted in (("full", None), ("mended", known)):
        files = [path for path in (place / folder / "files/md5").glob("*/*") if path.suffix not in (".tmp", ".dir")]
        assert all(hash_of(path) == path.parent.name + path.name for path in files)
        assert wanted is None or wanted == {path.parent.name + path.name for path in files}


@needs_mounts
@pytest.mark.parametrize("folder", [".", "data", ".dvc/cache"])
def test_a_read_only_disk_is_said_and_what_was_there_stays(place, folder):
    change(place, fetch__sources__pretraining__rows=400)
    lock = (place / "dvc.lock").read_bytes()
    before = hash_of(place / "data/raw")
    done = in_own_mounts(place, f"{read_only(folder)} && python -m dvc repro")
    assert done.returncode != 0 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (place / "dvc.lock").read_bytes() == lock
    assert folder == ".dvc/cache" or hash_of(place / "data/raw") == before
    assert list(place.glob("**/*.incoming")) == []
    assert dvc(place, "repro", "fetch").returncode == 0
    assert_as_locked(place, "data/raw")


@needs_mounts
def test_a_launcher_in_a_read_only_tree_says_so_in_one_sentence(place):
    done = in_own_mounts(place, f"{read_only('.')} && {' '.join(FETCH)}")
    assert done.returncode == 2 and "docker/run: Read-only file system at " in done.stderr and "Traceback" not in done.stderr
    assert_as_locked(place, "data/raw")


def test_a_clock_that_was_set_back_hides_no_change(place):
    """Every file was written a year ahead of now; what is changed since has an older time, and the same size."""
    ahead = time.time() + 365 * 24 * 3600
    for path in place.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path, (ahead, ahead))
    assert_up_to_date(place)
    source = place / "stages/fetch.py"
    source.write_text(source.read_text().replace("of", "fo", 1))
    rows = place / ROWS
    rows.write_bytes(rows.read_bytes().swapcase())
    assert rows.stat().st_mtime < ahead - 1000
    said = dvc(place, "status").stdout
    assert "stages/fetch.py" in said and "data/raw" in said
    done = dvc(place, "repro")
    assert "Running stage 'fetch'" in done.stdout and "Stage 'base-model' didn't change" in done.stdout
    assert_as_locked(place, "data/raw", "models/base")
    assert outs(place) == outs_of_head(place)


def outs_of_head(folder):
    text = git(folder, "show", "HEAD:dvc.lock")
    (folder / "head").mkdir()
    (folder / "head/dvc.lock").write_text(text)
    return outs(folder / "head")


@pytest.mark.parametrize("fault", [flip, cut])
def test_damage_in_the_cache_gets_into_no_stage_and_is_told_with_what_mends_it(place, fault):
    """DVC brings a damaged file back from its cache, and holds it to be the right one."""
    damaged = Cache(place).kept(hash_of(place / ROWS))
    fault(damaged)
    remove(place / "data/raw")
    assert dvc(place, "checkout").returncode == 0
    assert hash_of(place / "data/raw") != outs(place)["data/raw"]
    assert_up_to_date(place)

    advice = f"remove data/raw and {damaged.relative_to(place)}, which DVC's cache holds damaged, and run `dvc repro`"
    checked = verify(place)
    assert checked.returncode == 1 and f"fetch: {ROWS}: in this folder is not what dvc.lock says" in checked.stdout
    assert advice in checked.stdout
    change(place, base_model__steps=4)
    refused = dvc(place, "repro")
    assert refused.returncode != 0 and f"docker/run: {ROWS} is not what dvc.lock says" in refused.stderr
    assert advice in refused.stderr and "Traceback" not in refused.stderr and not (place / "models/base").exists()

    remove(place / "data/raw")
    remove(damaged)
    assert dvc(place, "repro", "fetch").returncode == 0
    assert_as_locked(place, "data/raw")
    assert Cache(place).damaged(outs(place)["data/raw"]) == []


def test_damage_in_the_tree_that_leaves_a_files_time_gets_into_no_stage(place):
    assert_up_to_date(place)  # DVC has read every file
    flip(place / ROWS)
    assert_up_to_date(place)
    change(place, base_model__steps=4)
    refused = dvc(place, "repro")
    assert refused.returncode != 0
    assert f"docker/run: {ROWS} is not what dvc.lock says" in refused.stderr
    damaged = Cache(place).damaged(outs(place)["data/raw"])  # a hard link's two names hold one file
    named = "".join(f" and {path.relative_to(place)}, which DVC's cache holds damaged," for path in damaged)
    assert len(damaged) == 1 and f"remove data/raw{named} and run `dvc repro`" in refused.stderr
    for path in (place / "data/raw", *damaged):
        remove(path)
    assert dvc(place, "repro", "fetch").returncode == 0
    assert_as_locked(place, "data/raw")


@pytest.mark.parametrize("fault", [cut, rename])
def test_a_damaged_list_of_a_folders_files_leaves_the_result_right_and_verify_names_it(place, fault):
    listing = Cache(place).kept(outs(place)["data/raw"])
    fault(listing)
    remove(place / "data/raw")
    assert dvc(place, "repro", "fetch").returncode == 0
    assert_as_locked(place, "data/raw")
    checked = verify(place)
    assert checked.returncode == 1 and "fetch: data/raw: is damaged in DVC's cache: remove data/raw and " in checked.stdout
    remove(place / "data/raw")
    remove(listing)
    assert dvc(place, "repro", "fetch").returncode == 0
    assert_as_locked(place, "data/raw")
    assert Cache(place).damaged(outs(place)["data/raw"]) == []

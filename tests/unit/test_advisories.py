"""docker/audit: every package of every lock is asked about, and one without an answer is never called sound."""

import re

import pytest

from stages.host.advisories import SOUND, UNKNOWN, VULNERABLE, _without_a_name_twice, pinned, told
from tests.imports import ROOT

LOCKS = sorted((ROOT / "docker").glob("*.lock"))
PACKAGES = {("click", "8.1.0"): ["cpu.lock", "host.lock"], ("torch", "2.13.0"): ["train.lock"]}
KNOWN = {"id": "PYSEC-2099-1", "fix_versions": ["8.1.1"], "aliases": [], "description": ""}


def answer(name, version, *vulns):
    """As pip-audit writes it."""
    return {"name": name, "version": version, "vulns": list(vulns)}


def skipped(name):
    return {"name": name, "skip_reason": "Dependency not found on PyPI and could not be audited"}


def test_every_line_that_pins_a_package_is_asked_about_by_its_published_version():
    packages = pinned(LOCKS)
    assert not any("+" in version for _, version in packages)
    for lock in LOCKS:
        lines = set(re.findall(r"^([\w.-]+==[^\s;\\+]+)", lock.read_text(), re.MULTILINE))
        assert lines and len(lines) == sum(lock.name in named for named in packages.values())


def test_a_package_that_locks_pin_in_several_versions_is_asked_about_in_each():
    packages = [("networkx", "3.4"), ("click", "8.1.0"), ("networkx", "3.6"), ("networkx", "3.5")]
    parts = list(_without_a_name_twice(packages))
    assert all(len({name for name, _ in part}) == len(part) for part in parts)
    assert sorted(package for part in parts for package in part) == sorted(packages)


@pytest.mark.parametrize(
    ("answers", "status", "line"),
    [
        ([answer("click", "8.1.0"), answer("torch", "2.13.0")], SOUND, "2 packages of docker/*.lock: no known vulnerability"),
        ([answer("click", "8.1.0", KNOWN), answer("torch", "2.13.0")], VULNERABLE,
         "click 8.1.0 (cpu.lock, host.lock): PYSEC-2099-1, mended in 8.1.1"),
        ([answer("click", "8.1.0"), skipped("torch")], UNKNOWN, "1 of 2 packages could not be looked up: torch 2.13.0"),
        ([answer("click", "8.1.0", KNOWN), skipped("torch")], VULNERABLE, "1 of 2 packages could not be looked up: torch 2.13.0"),
        ([skipped("click"), skipped("torch")], UNKNOWN, "2 of 2 packages could not be looked up: click 8.1.0, torch 2.13.0"),
        ([answer("click", "8.0.0"), answer("torch", "2.13.0")], UNKNOWN, "1 of 2 packages could not be looked up: click 8.1.0"),
    ],
    ids=["sound", "vulnerable", "one unknown", "vulnerable and unknown", "all unknown", "another version"],
)  # fmt: skip
def test_a_package_without_an_answer_is_never_called_sound(answers, status, line):
    found, lines = told(PACKAGES, answers)
    assert found == status and line in lines

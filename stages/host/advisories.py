"""`docker/audit`: asks a service of advisories about every package that a lock pins.

A package that the service has no answer for counts as not looked at, never as sound: pip-audit itself ends well there.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from stages.harness.errors import InputError
from stages.host.provenance import package_name, pins

PIP_AUDIT = "pip-audit==2.10.1"
SOUND, VULNERABLE, UNKNOWN = 0, 1, 2  # exit statuses
Packages = dict[tuple[str, str], list[str]]  # name and version: the locks that pin them


@click.command()
@click.option("--service", type=click.Choice(["osv", "pypi", "esms"]), default="osv", show_default=True, help="who is asked")
@click.option("--osv-url", help="a mirror of OSV's query API")
def main(service: str, osv_url: str | None) -> None:
    """Asks about every package that a lock pins.

    Exits with 0 where none is known to be vulnerable, with 1 where one is, with 2 where not all could be looked up.
    """
    packages = pinned(sorted(Path("docker").glob("*.lock")))
    try:
        status, lines = told(packages, ask(list(packages), ["-s", service, *(["--osv-url", osv_url] if osv_url else [])]))
    except InputError as error:
        click.echo(f"docker/audit: {error}", err=True)
        raise SystemExit(UNKNOWN) from None
    click.echo("\n".join(lines))
    raise SystemExit(status)


def pinned(locks: list[Path]) -> Packages:
    """The locks that pin each package and version, for whatever platform; 2.13.0+cpu is a build of version 2.13.0."""
    found: Packages = {}
    for lock in locks:
        for name, version in pins(lock.read_text(encoding="utf-8")):
            named = found.setdefault((package_name(name), version.partition("+")[0]), [])
            named += [lock.name] if lock.name not in named else []
    return found


def ask(packages: list[tuple[str, str]], options: list[str]) -> list[dict[str, Any]]:
    """pip-audit's answers; InputError where it cannot be had, or the service does not answer."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if not uv:
        raise InputError("uv is not here: run `make .venv`, which installs it")
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for number, names in enumerate(_without_a_name_twice(packages)):
            file = Path(folder) / f"{number}.txt"
            file.write_text("".join(f"{name}=={version}\n" for name, version in names), encoding="utf-8")
            command = [uv, "tool", "run", PIP_AUDIT, "-r", str(file), "--no-deps", "--disable-pip", *options, "-f", "json"]
            done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
            try:
                answers += json.loads(done.stdout)["dependencies"]
            except (ValueError, KeyError):
                why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
                raise InputError(f"nothing could be looked up ({why}): run it where the service is in reach, or name another with "
                                 "--service or --osv-url") from None  # fmt: skip
    return answers


def told(packages: Packages, answers: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit status and what is to be said."""
    looked_at = {(answer["name"], answer["version"]): answer["vulns"] for answer in answers if "vulns" in answer}
    vulnerable = list(_vulnerable(packages, looked_at))
    if missing := sorted(packages.keys() - looked_at.keys()):
        some = ", ".join(f"{name} {version}" for name, version in missing[:5]) + (" ..." if len(missing) > 5 else "")
        unknown = f"{len(missing)} of {len(packages)} packages could not be looked up: {some}"
        return VULNERABLE if vulnerable else UNKNOWN, [*vulnerable, unknown]
    if vulnerable:
        return VULNERABLE, vulnerable
    return SOUND, [f"{len(packages)} packages of docker/*.lock: no known vulnerability"]


def _vulnerable(packages: Packages, looked_at: dict[tuple[str, str], list[dict[str, Any]]]) -> Iterator[str]:
    for (name, version), locks in sorted(packages.items()):
        for known in looked_at.get((name, version), []):
            mended = f"mended in {', '.join(known['fix_versions'])}" if known["fix_versions"] else "not mended yet"
            yield f"{name} {version} ({', '.join(locks)}): {known['id']}, {mended}"


def _without_a_name_twice(packages: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """In as many parts as the package with the most versions needs: pip-audit takes each name once."""
    while packages:
        first = dict(reversed(packages))
        yield list(first.items())
        packages = [package for package in packages if first[package[0]] != package[1]]


if __name__ == "__main__":
    main()

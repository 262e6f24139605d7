"""`docker/lock`: writes docker/<name>.lock, every package by hash, from the direct needs in docker/<name>.in.

A package moves only when its .in says so, when it is named with --upgrade, or when nothing pins it yet.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click

from stages.harness.errors import InputError
from stages.host.provenance import pins

# In this order, for a .in may be held to another's lock (`-c`): tools build llama.cpp, uv installs, host runs beside stages.
CPU_LOCKS = ("uv", "tools", "cpu", "export", "host")
CUDA_LOCKS = ("rollout", "train")
CPU_PYTHONS = ("--universal", "--python-version", "3.11")
CUDA_PYTHON = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_35")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*CPU_LOCKS, *CUDA_LOCKS]))
@click.option("--upgrade", multiple=True, metavar="PACKAGE", help="let this package move to its newest version")
def main(names: tuple[str, ...], upgrade: tuple[str, ...]) -> None:
    """Writes the locks that are NAMED (default: all) and says which packages moved."""
    folder = Path.cwd() / "docker"
    for name in [name for name in (*CPU_LOCKS, *CUDA_LOCKS) if not names or name in names]:
        before = versions(folder / f"{name}.lock")
        try:
            write(folder, name, upgrade)
        except InputError as error:
            raise click.ClickException(str(error)) from None
        after = versions(folder / f"{name}.lock")
        moved = [
            f"  {package} {before.get(package, '(new)')} -> {after.get(package, '(gone)')}"
            for package in sorted(before | after)
            if before.get(package) != after.get(package)
        ]
        click.echo("\n".join([f"docker/{name}.lock: {len(after)} packages, {len(moved)} moved", *moved]))


def write(folder: Path, name: str, upgrade: tuple[str, ...] = ()) -> None:
    """Resolves one .in with uv; InputError with uv's words where it cannot."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not uv:
        raise InputError("uv is not here: run `make .venv`, which installs it")
    command = [uv, "pip", "compile", f"{name}.in", "--output-file", f"{name}.lock", "--generate-hashes", "--no-annotate",
               "--no-header", "--quiet", "--no-emit-index-url", "--no-emit-find-links"]  # fmt: skip
    command += CUDA_PYTHON if name in CUDA_LOCKS else CPU_PYTHONS
    command += subprocess.run(["./torch_source", f"{name}.in"], cwd=folder, capture_output=True, text=True).stdout.split()
    for package in upgrade:
        command += ["--upgrade-package", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"docker/{name}.in does not resolve: {done.stderr.strip()}")
    lock = folder / f"{name}.lock"
    lock.write_text(with_hashes_of_every_python(lock.read_text(encoding="utf-8"), (folder / f"{name}.in").read_text(encoding="utf-8")), encoding="utf-8")


def with_hashes_of_every_python(lock: str, direct: str) -> str:
    """torch's hashes as the .in names them, for all Pythons: uv keeps those of the wheels that it sees, maybe of one."""
    hashes = re.findall(r"--hash=(\S+)", direct)
    if not hashes:
        return lock
    lines = "".join(f" \\\n    --hash={found}" for found in hashes)
    return re.sub(r"^(torch==\S+)(?: \\\n +--hash=\S+)+", lambda match: match[1] + lines, lock, flags=re.MULTILINE)


def versions(lock: Path) -> dict[str, str]:
    """The packages that a lock pins; none where there is no lock."""
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    return dict(pins(text))


if __name__ == "__main__":
    main()

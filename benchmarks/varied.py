"""`mathmind verify` where everything differs that must not matter: do the committed bytes come out?

    python benchmarks/varied.py --cpus 0 --user other [--engine docker] [--json FILE]
    python benchmarks/varied.py --narrowed --json FILE

A clone of HEAD at another path, which has a space and a letter that is no ASCII, is verified with another HOME, locale, time zone
and umask; on these cores alone (in docker those that its daemon was started on), as another user where root asks for one, who must be
able to read this folder and its Python, and for docker be of its group. With --narrowed,
`run.unpinned` lets in variables that hold the libraries to fewer instructions than docker/determinism.env does, and each stage is
verified alone, from the committed inputs in DVC's cache, so that each says for itself whether its bytes follow from them.
"""

import argparse
import json
import os
import pwd
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.harness.params import read_params  # noqa: E402
from stages.host.cache import Cache  # noqa: E402
from stages.host.graph import DVC, read_graph  # noqa: E402

ELSEWHERE = {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}  # small letters of I with and without a dot; 5 h 45 min
UMASK = 0o077
NARROWED = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's kernels by SSE2
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",  # numpy's products by SSE3
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX512F,-SSE4_1,-SSE4_2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=["native", "docker", "podman"], default="native")
    parser.add_argument("--cpus", type=lambda text: {int(part) for part in text.split(",")}, default=os.sched_getaffinity(0))
    parser.add_argument("--user")
    parser.add_argument("--narrowed", action="store_true")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    chosen = parser.parse_args()
    user = pwd.getpwnam(chosen.user) if chosen.user else None
    with tempfile.TemporaryDirectory(prefix="elsewhere-") as folder:
        Path(folder).chmod(0o755)
        place = Path(folder) / "ein anderer Ört" / "mathmind"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
        each = prepare_narrowed(place) if chosen.narrowed else [[]]
        home = Path(folder) / "home"
        home.mkdir()
        if user:
            subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", folder], check=True)
        varied = {"HOME": str(home), **ELSEWHERE, **(NARROWED if chosen.narrowed else {})}
        environment = {"PATH": os.environ["PATH"], "MATHMIND_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1", **varied}
        started = time.monotonic()
        verify = partial(
            subprocess.run, cwd=place, env=environment, umask=UMASK, stdout=subprocess.PIPE, text=True, user=user and user.pw_uid,
            group=user and user.pw_gid, extra_groups=user and os.getgrouplist(user.pw_name, user.pw_gid),
            preexec_fn=partial(os.sched_setaffinity, 0, chosen.cpus),
        )  # fmt: skip
        command = [sys.executable, "-m", "stages", "verify", "--json", "--engine", chosen.engine]
        verdicts = [verdict_of(verify([*command, *asked])) for asked in each]
    differing = [verdict["verdict"] for verdict in verdicts if verdict["verdict"] != "same"]
    figures = {
        "engine": chosen.engine,
        "cores": len(chosen.cpus),
        "user": "another" if user else "the same",
        "umask": f"{UMASK:03o}",
        **varied,
        "HOME": "another",
        "path": "another, with a space and an umlaut",
        "verdict": max(differing, default="same"),
        "stages": sum(len(verdict["stages"]) for verdict in verdicts),
        "seconds": round(time.monotonic() - started),
        "findings": [
            {key: finding[key] for key in ("stage", "path", "how")} for verdict in verdicts for finding in verdict["findings"]
        ],
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table("what", "how it was")
    for name, value in figures.items():
        if name != "findings":
            table.add_row(name, str(value))
    Console().print(table)
    for finding in figures["findings"]:
        print(f"{finding['stage']}: {finding['path']}: {finding['how']}")
    sys.exit(1 if differing else 0)


def verdict_of(done: subprocess.CompletedProcess) -> dict:
    if done.returncode not in (0, 1, 3):
        sys.exit(f"verify ended with {done.returncode}, its words stand above: {done.stdout[-500:]}")
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def prepare_narrowed(place: Path) -> list[list[str]]:
    """Commits run.unpinned, lends the clone this folder's cache, and asks for each stage alone."""
    params = place / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("\n  unpinned: false", "\n  unpinned: true"), encoding="utf-8")
    subprocess.run(["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org", "commit", "-qam", "unpinned"],
                   cwd=place, check=True)  # fmt: skip
    subprocess.run([*DVC, "config", "--local", "cache.dir", str(Cache(ROOT).folder)], cwd=place, check=True)
    return [["--stages", name] for name in read_graph(place, read_params(params))]


if __name__ == "__main__":
    main()

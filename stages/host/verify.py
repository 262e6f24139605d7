"""`mathmind verify`: rebuilds what is committed, from nothing, in a scratch clone, and says whether it is the same.

DVC does not check that: where bits differ it overwrites dvc.lock and ends well. Here the committed lock is first held to the files
beside it, then to a rebuild with a cache of its own; the first stage and file that differ are named, with how, and why perhaps.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.harness.errors import InputError
from stages.harness.params import read_params
from stages.harness.processes import die_with_parent
from stages.host.cache import Cache, difference, outside_a_run
from stages.host.differences import Difference, differences, first_value
from stages.host.graph import DVC, GraphStage, entry_deps, entry_outs, files_of, lock_outs, lock_stages, parse_yaml, read_graph
from stages.host.launcher import locked, remove
from stages.host.provenance import TIMING, read_timing

SAME, DIFFERENT, CLOSE = 0, 1, 3  # exit statuses
CLOSE_ENOUGH = 1e-3  # relative distance of numbers that another processor's rounding may explain
SCRATCH = Path(".dvc/tmp/mathmind/verify")
READY = Path(".dvc/tmp/rebuild-ready")  # in a clone that was prepared to its end
SHOWN = 8  # files of an out that are told of


@dataclass(frozen=True)
class Finding:
    """Something that is not as dvc.lock says: a stage's file or input, and how it differs."""

    stage: str
    path: str
    how: str
    files: tuple[Difference, ...] = ()  # of an out, where both versions are here to compare

    @property
    def far(self) -> float:
        return max((file.far for file in self.files), default=float("inf"))


@dataclass(frozen=True)
class Verdict:
    """What verify found; `status` is its exit status."""

    commit: str
    stages: tuple[str, ...]
    rebuilds: tuple[Path, ...]
    findings: tuple[Finding, ...] = ()  # in the graph's order: the first is where it begins
    causes: tuple[str, ...] = ()
    other_machine: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def metrics_same(self) -> bool:
        return not any(finding.path == "metrics.json" for finding in self.findings)

    @property
    def status(self) -> int:
        if not self.findings:
            return SAME
        close = self.other_machine and self.metrics_same and all(finding.far <= CLOSE_ENOUGH for finding in self.findings)
        return CLOSE if close else DIFFERENT

    def as_json(self) -> dict[str, Any]:
        said = asdict(self)
        for finding in said["findings"]:
            for file in finding["files"]:
                file["far"] = None if file["far"] == float("inf") else file["far"]
        return {"verdict": {SAME: "same", CLOSE: "close", DIFFERENT: "different"}[self.status], **said,
                "metrics_same": self.metrics_same, "rebuilds": [str(path) for path in self.rebuilds]}  # fmt: skip


class Commit:
    """The state that is verified: HEAD, its lock and its graph."""

    def __init__(self, tree: Path) -> None:
        """Raises InputError where the folder is no repository or its HEAD holds no lock."""
        self.tree = tree
        try:
            self.id = _git(tree, "rev-parse", "HEAD").strip()
        except subprocess.CalledProcessError:
            raise InputError(f"{tree} is not a git repository with a commit: only what is committed can be rebuilt") from None
        lock = self.text("dvc.lock")
        if lock is None:
            raise InputError("HEAD has no dvc.lock: run `dvc repro`, commit what it wrote, and run this again")
        try:
            self.lock: dict[str, dict[str, Any]] = parse_yaml(lock).get("stages", {})
        except YAMLError as error:
            raise InputError(f"HEAD's dvc.lock is damaged ({str(error).splitlines()[0]}): take it from an earlier commit, or run "
                             "`dvc repro` and commit it anew") from None  # fmt: skip
        self.tracked = set(_git(tree, "ls-tree", "-r", "--name-only", "-z", "HEAD").split("\0"))
        self.hashes: dict[str, str] = {}

    @cached_property
    def cache(self) -> Cache:
        """DVC's cache here; to ask where that is takes a second."""
        return Cache(self.tree)

    def content(self, path: str | Path) -> bytes | None:
        """A file of the commit, or None."""
        done = subprocess.run(["git", "cat-file", "blob", f"{self.id}:{path}"], cwd=self.tree, capture_output=True)
        return done.stdout if done.returncode == 0 else None

    def text(self, path: str | Path) -> str | None:
        """A file of the commit as text, or None."""
        content = self.content(path)
        return None if content is None else content.decode()

    def hash(self, path: str) -> str:
        """The MD5 of a file of the commit."""
        if path not in self.hashes:
            self.hashes[path] = hashlib.md5(self.content(path) or b"", usedforsecurity=False).hexdigest()
        return self.hashes[path]

    def outs(self, stage: str) -> dict[str, str]:
        """The MD5 of each out, as the lock has it."""
        return entry_outs(self.lock.get(stage, {}))

    def record(self, stage: str) -> dict[str, Any]:
        """The timing record of the committed run; nothing where there is none."""
        return json.loads(self.text(TIMING / f"{stage}.json") or "{}")


def verify(tree: Path, stages: Sequence[str] = (), *, twice: bool = False, engine: str | None = None) -> Verdict:
    """Rebuilds HEAD once or twice, all of it or some stages from the inputs that DVC's cache holds.

    A rebuild that was interrupted goes on where it stopped. Clones of a rebuild that is the same are removed.
    Raises InputError where there is nothing to verify, an unknown stage is named, or a rebuild fails.
    """
    commit = Commit(tree)
    with tempfile.TemporaryDirectory() as folder:
        params, graph = graph_of(commit, Path(folder))
        if unknown := [name for name in stages if name not in graph]:
            raise InputError(f"dvc.yaml has no stage {unknown[0]}: name some of {', '.join(graph)}")
        findings = [*of_the_lock(commit, params, graph), *_of_the_files(commit, graph)]
    chosen = tuple(name for name in graph if not stages or name in stages)
    if findings:
        return Verdict(commit.id, chosen, (), tuple(findings))

    asked = hashlib.sha256(json.dumps([sorted(stages), engine]).encode()).hexdigest()[:8]  # all stages' names are too long for a path
    clones = [tree / SCRATCH / f"{commit.id[:12]}-{asked}-{number}" for number in ((1, 2) if twice else (1,))]
    for clone in clones:
        _rebuild(commit, clone, stages, engine)
    made = [_made_in(clone) for clone in clones]
    findings = [finding for name in chosen for clone, outs in zip(clones, made) for finding in _of_the_stage(commit, name, clone, outs[name])]
    if twice:
        findings += [finding for name in chosen for finding in _between(name, clones, [outs[name] for outs in made])]
    records = {name: (commit.record(name), read_timing(clones[0], name)) for name in chosen}
    verdict = Verdict(
        commit.id, chosen, tuple(clones), tuple(findings),
        causes=tuple(_causes(findings[0].stage, *records[findings[0].stage])) if findings else (),
        other_machine=any(_machine(then) != _machine(now) for then, now in records.values()),
        seconds={name: now.get("seconds", 0.0) for name, (_, now) in records.items()},
    )  # fmt: skip
    if verdict.status == SAME:
        for clone in clones:
            remove(clone)
    return verdict


def told(verdict: Verdict) -> Iterator[str]:
    """A verdict in sentences."""
    commit, count = verdict.commit[:12], len(verdict.stages)
    if verdict.status == SAME:
        both = ", both times" if len(verdict.rebuilds) > 1 else ""
        yield f"{commit}: every out of {count} stage{'s' * (count > 1)} is the committed one, byte for byte{both}"
        return
    first, *others = verdict.findings
    if verdict.status == CLOSE:
        yield f"{commit}: the same numbers on another machine, but for rounding; {first.stage} is the first stage whose bytes differ"
    yield f"{first.stage}: {first.path}: {first.how}"
    for cause in verdict.causes:
        yield f"perhaps: {cause}"
    if others:
        listed = dict.fromkeys(f"{finding.stage} ({finding.path})" for finding in others)
        yield f"also: {', '.join(listed)}"
    for clone in verdict.rebuilds:
        yield f"the rebuild is kept in {clone}"


def graph_of(commit: Commit, folder: Path) -> tuple[dict[str, Any], dict[str, GraphStage]]:
    """The committed params.yaml and stages."""
    for name in ("dvc.yaml", "params.yaml"):
        (folder / name).write_text(commit.text(name) or "", encoding="utf-8")
    params = read_params(folder / "params.yaml")
    return params, read_graph(folder, params)


def of_the_lock(commit: Commit, params: dict[str, Any], graph: dict[str, GraphStage]) -> Iterator[Finding]:
    """Where the committed lock does not fit the graph, the files committed beside it, or itself."""
    made = lock_outs(commit.lock)
    for name, stage in graph.items():
        entry = commit.lock.get(name)
        if entry is None:
            yield Finding(name, "dvc.lock", "has no entry of this stage: run `dvc repro` and commit the lock")
            continue
        if " ".join(entry["cmd"].split()) != stage.command:
            yield Finding(name, "dvc.lock", "was written by another command: run `dvc repro` and commit the lock")
        noted = entry.get("params", {}).get("params.yaml", {})
        if apart := first_value({section: params.get(section) for section in stage.params}, noted):
            yield Finding(name, "params.yaml", f"is not what dvc.lock says that this stage ran with: there {apart[0]}")
        for path, md5 in entry_deps(entry).items():
            known = made.get(path)
            if known is not None and known != md5:
                yield Finding(name, path, f"dvc.lock says that this stage read {md5}, and that {known} was written")
            elif path in commit.tracked and (found := commit.hash(path)) != md5:
                yield Finding(name, path, f"is committed as {found}, dvc.lock says that this stage read {md5}")
        for path, md5 in commit.outs(name).items():
            if path in commit.tracked and (found := commit.hash(path)) != md5:
                yield Finding(name, path, f"is committed as {found}, dvc.lock says that {md5} was written")


def _of_the_files(commit: Commit, graph: dict[str, GraphStage]) -> Iterator[Finding]:
    """Outs that are not what the lock says: in the working folder, where its lock is the committed one, or in DVC's cache."""
    lock = commit.tree / "dvc.lock"
    is_here = lock.is_file() and lock.read_text(encoding="utf-8") == commit.text("dvc.lock")
    for name in graph:
        for path, md5 in commit.outs(name).items():
            if is_here and (found := difference(commit.tree, path, md5, commit.cache)):
                yield Finding(name, found[0], f"in this folder {found[1]}")
            elif commit.cache.damaged(md5):
                yield Finding(name, path, f"is damaged in DVC's cache: {commit.cache.mend(path, md5)}")


def _rebuild(commit: Commit, clone: Path, stages: Sequence[str], engine: str | None) -> None:
    """Runs the stages in a clone of the commit, with a cache of its own."""
    with locked(clone.with_name(f"{clone.name}.lock"), "verify: waiting for another verify of this commit") as lock:
        if not (clone / READY).is_file():
            remove(clone)
            _prepare(commit, clone, stages, engine)
        (clone / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)  # what a killed dvc left; no other runs here now
        # Of a whole rebuild DVC leaves out what an interrupted one has made; some stages are made again, for their outs came along.
        chosen = ("--force", "--single-item", *stages) if stages else ()
        if status := _dvc(clone, "repro", *chosen, holds=(lock.fileno(),)):
            raise InputError(f"the rebuild in {clone} failed (dvc repro ended with {status}): its own words stand above; when that is "
                             "mended, run verify again, which goes on where this stopped")  # fmt: skip


def _prepare(commit: Commit, clone: Path, stages: Sequence[str], engine: str | None) -> None:
    _git(commit.tree, "clone", "--quiet", "--no-hardlinks", str(commit.tree), str(clone))
    _git(clone, "checkout", "--quiet", "--detach", commit.id)
    for option, folder in (("cache.dir", clone / ".dvc" / "cache"), ("remote.committed.url", commit.cache.folder)):
        place = os.path.relpath(folder, clone)  # DVC writes ASCII alone, and the way to here may hold more
        if _dvc(clone, "config", "--local", option, place):
            raise InputError(f"DVC cannot be told of {folder} (its own words stand above): give DVC's cache a path in ASCII")
    yaml = YAML()
    params = yaml.load((clone / "params.yaml").read_text(encoding="utf-8"))
    params["run"]["local_files"] = str((commit.tree / params["run"]["local_files"]).resolve())
    if engine:
        params["run"]["engine"] = engine
    params["tracking"].update(wandb="disabled", tensorboard=False)  # a rebuild is no experiment
    yaml.dump(params, clone / "params.yaml")  # neither section belongs to a stage: the lock stays

    added = [path for path in commit.tracked if path.endswith(".dvc")]  # a teacher's replies
    if added:
        _pull(clone, added)
    if stages:
        made = {path for name in commit.lock for path in commit.outs(name)}
        needed = {path for name in stages for path in entry_deps(commit.lock[name])} & made - commit.tracked
        if needed:
            _pull(clone, sorted(needed))
    else:
        (clone / "dvc.lock").unlink()
        for name in commit.lock:
            for path in commit.outs(name):
                remove(clone / path)
    (clone / READY).parent.mkdir(parents=True, exist_ok=True)
    (clone / READY).touch()


def _pull(clone: Path, paths: Sequence[str]) -> None:
    if status := _dvc(clone, "pull", "--quiet", "--remote", "committed", *paths):
        raise InputError(f"DVC's cache here does not hold all of {', '.join(paths)} (dvc pull ended with {status}): run `dvc pull` or "
                         "`dvc repro` first, or verify all stages")  # fmt: skip


def _made_in(clone: Path) -> dict[str, dict[str, str]]:
    """The MD5 of each out by stage, as DVC has just written it into the clone's lock."""
    return {name: entry_outs(entry) for name, entry in lock_stages(clone).items()}


def _of_the_stage(commit: Commit, stage: str, clone: Path, outs: dict[str, str]) -> Iterator[Finding]:
    """Outs of one stage in a clone that are not the committed ones."""
    for path, md5 in commit.outs(stage).items():
        if (found := outs[path]) != md5:
            known = _known(commit, path, md5, clone)
            files = tuple(differences(known, files_of(clone / path))) if known else ()
            yield Finding(stage, path, _told(files) or f"is {found}, committed {md5}; DVC's cache here no longer holds that one "
                                                            "to say how they differ", files)  # fmt: skip


def _between(stage: str, clones: Sequence[Path], made: Sequence[dict[str, str]]) -> Iterator[Finding]:
    """Outs of one stage that two rebuilds made differently."""
    for path, md5 in made[0].items():
        if made[1][path] != md5:
            files = tuple(differences(*(files_of(clone / path) for clone in clones)))
            yield Finding(stage, path, f"two rebuilds differ: {_told(files)}", files)


def _told(files: Sequence[Difference]) -> str:
    told = [f"{file.file} {file.how}" if len(files) > 1 else f"{file.file}: {file.how}" for file in files[:SHOWN]]
    return "; ".join(told) + (f"; and {len(files) - SHOWN} files more" if len(files) > SHOWN else "")


def _known(commit: Commit, path: str, md5: str, clone: Path) -> dict[str, Path]:
    """The committed files of an out: from git, DVC's cache or the working folder; nothing where none has them whole."""
    if path in commit.tracked:
        place = clone / ".dvc" / "tmp" / "committed" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(commit.content(path) or b"")
        return {place.name: place}
    cached = {Path(path).name: md5} if not md5.endswith(".dir") else commit.cache.parts(md5)
    objects = {name: commit.cache.kept(part) for name, part in cached.items()}
    return objects if objects and all(place.is_file() for place in objects.values()) else {}


def _causes(stage: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What may have made a stage's outs differ, read from the records of the committed run and the rebuild."""
    if not then:
        yield f"there is no record of the committed run of {stage} to compare machines and packages with"
        return
    if "statistical" in (then.get("level"), now.get("level")):
        yield f"{stage} promises no bits on this GPU or with these parameters (level: statistical)"
    machines = (_machine(then), _machine(now))
    for name in sorted({*machines[0], *machines[1]}):
        values = [machine.get(name, "none") for machine in machines]
        if values[0] != values[1]:
            yield f"another machine: {name} is {values[1]}, was {values[0]}"
    for name in ("python", "recipe", "engine"):
        if then.get(name) != now.get(name):
            yield f"{name} is {now.get(name)}, was {then.get(name)}"
    if now.get("pinned") is False:
        yield "packages are installed that the lock does not pin (pinned: false)"
    if machines[0] == machines[1] and then.get("recipe") == now.get("recipe"):
        yield f"machine and packages are the same: {stage} may read what is not declared, or leave its order of work to chance"


def _machine(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("machine", {})


def _dvc(folder: Path, *arguments: str, holds: Sequence[int] = ()) -> int:
    """DVC's exit status; it ends with this process. What it says goes to standard error, for ours may be JSON.

    `holds` are files that it keeps open, and so the locks on them until it has ended.
    """
    command, begin = [*DVC, *arguments], partial(die_with_parent, os.getpid())
    return subprocess.run(
        command, cwd=folder, env=_environment(), stdout=sys.stderr, pass_fds=holds, preexec_fn=begin
    ).returncode


def _environment() -> dict[str, str]:
    """The caller's without a run's own variables, so that the clone is a repository of its own."""
    return {**outside_a_run(), "MATHMIND_PYTHON": os.environ.get("MATHMIND_PYTHON", sys.executable)}


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

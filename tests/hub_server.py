"""A model hub on loopback, for tests: the hub's protocol as huggingface_hub 1.33 and datasets 4.8 speak it, and its faults.

Repositories lie in a folder, one folder a commit. Large files are redirected to a second server, which stands for the
hub's storage hosts. The package olah serves this protocol too, but as a proxy of the real hub or of git mirrors: it
plants no faults and shows no request's headers.
"""

import hashlib
import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from ruamel.yaml import YAML

LARGE = (".parquet", ".safetensors", ".gguf", ".bin")  # kept outside git, under their SHA-256
API = re.compile(
    r"/api/(?P<kind>dataset|model)s/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<commit>[^/]+)(/(?P<path>.*))?)?"
)
FILE = re.compile(r"/((?P<kind>dataset)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<path>.+)")
CHUNK = 2**14


@dataclass
class Repo:
    """What the hub knows of a repository; `token` opens it where it is gated or private."""

    folder: Path
    commits: list[str] = field(default_factory=list)  # the newest last: what `main` means
    gated: Literal[False, "auto", "manual"] = False
    token: str | None = None
    private: bool = False


@dataclass
class Fault:
    """What goes wrong with requests whose path ends so, `times` times."""

    path: str
    times: int = 1
    status: int | None = None  # answers this and no content
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of a body, then the connection ends
    stall_after: int | None = None  # bytes of a body, then nothing more comes
    body: bytes | None = None  # in place of the file's
    ignores_ranges: bool = False


@dataclass
class Seen:
    """One request: which server it came to, and what it said."""

    server: Literal["hub", "storage"]
    method: str
    path: str
    headers: Message


class Hub:
    """Two servers and what lies behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = Lock()
        self.hub, self.storage = (_server(self, role, handler) for role, handler in self.handlers().items())

    def handlers(self) -> dict[str, type["_Handler"]]:
        """What answers the hub's requests, and the storage's."""
        return {"hub": HubItself, "storage": Storage}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def commit(self, kind: Literal["dataset", "model"], id: str, files: dict[str, bytes], **about: Any) -> str:
        """Puts a new commit on the main branch of a repository, which begins with the first; returns its name."""
        name = hashlib.sha1(repr((kind, id, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault((kind, id), Repo(self.folder / kind / id))
        for path, content in files.items():
            (repo.folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (repo.folder / name / path).write_bytes(content)
        repo.commits.append(name)
        for attribute, value in about.items():
            setattr(repo, attribute, value)
        return name

    def plant(self, path: str, **fault: Any) -> None:
        """Makes the next request for a path that ends so, or the next `times`, go wrong."""
        self.faults.append(Fault(path, **fault))

    def asked(self, path: str, server: str = "storage") -> list[Seen]:
        """The requests that brought a file's bytes, or tried to."""
        return [
            seen for seen in self.seen if seen.server == server and seen.method == "GET" and seen.path.endswith(path)
        ]

    def fault(self, path: str, *, of_body: bool) -> Fault | None:
        """The first fault planted there that is left, of those that damage a file's body or of the others."""
        with self.lock:
            planted = [fault for fault in self.faults if path.endswith(fault.path) and fault.times > 0]
            found = next((fault for fault in planted if (fault.status is None) == of_body), None)
            if found:
                found.times -= 1
            return found


@contextmanager
def serving(folder: Path, kind: type[Hub] = Hub):
    """A Hub that serves repositories below a folder while the context lasts."""
    hub = kind(folder)
    for server in (hub.hub, hub.storage):
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in (hub.hub, hub.storage):
            server.shutdown()
            server.server_close()


def _server(hub: Hub, role: str, answers: type["_Handler"]) -> ThreadingHTTPServer:
    handler = type("Handler", (answers,), {"hub": hub, "role": role})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    return server


class _Handler(BaseHTTPRequestHandler):
    """What both servers share: notes of every request, bodies by range, faults."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    role: str

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.begin()

    def do_GET(self) -> None:
        self.begin()

    def do_POST(self) -> None:
        self.begin()

    def begin(self) -> None:
        url = urlsplit(self.path)
        self.body = self.read_body()
        self.query, self.url_path = parse_qs(url.query), unquote(url.path)
        self.hub.seen.append(Seen(self.role, self.command, self.url_path, self.headers))
        if self.command != "HEAD" and (fault := self.hub.fault(self.url_path, of_body=False)):
            self.say(fault.status, headers=fault.headers)
        else:
            self.answer()

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, code: str = "") -> None:
        """A whole answer; `code` is the hub's own word for an error."""
        self.send_response(status)
        for name, value in {**(headers or {}), **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say_json(self, value: Any) -> None:
        self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def say_file(self, path: Path, headers: dict[str, str]) -> None:
        """A file, or what a Range header asks for of it."""
        fault = (None if self.command == "HEAD" else self.hub.fault(self.url_path, of_body=True)) or Fault("")
        content = path.read_bytes() if fault.body is None else fault.body
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, status, end = 0, 200, len(content)
        if asked and not fault.ignores_ranges:
            start, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            if start >= len(content):
                return self.say(416, headers={"Content-Range": f"bytes */{len(content)}"})
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        stop = min(limit for limit in (fault.cut_after, fault.stall_after, end - start) if limit is not None) + start
        for place in range(start, stop, CHUNK):
            self.wfile.write(content[place : min(place + CHUNK, stop)])
        self.wfile.flush()
        if fault.stall_after is not None:
            time.sleep(60)
        if stop < end:
            self.close_connection = True
        return None


class Storage(_Handler):
    """A storage host: large files under signed addresses, for whoever has the address."""

    def answer(self) -> None:
        kind, owner, name, commit, path = self.url_path.removeprefix("/").split("/", 4)
        if "Signature" not in self.query:
            return self.say(403)
        return self.say_file(self.hub.repos[kind, f"{owner}/{name}"].folder / commit / path, {})


class HubItself(_Handler):
    """The hub itself: what it knows of repositories, and small files."""

    def answer(self) -> None:
        if not (asked := API.fullmatch(self.url_path) or FILE.fullmatch(self.url_path)):
            return self.say(404)
        kind, id, commit = asked["kind"] or "model", asked["id"], asked["commit"] or "main"
        if (repo := self.hub.repos.get((kind, id))) is None:
            return self.say(401, code="RepoNotFound")
        if repo.private and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self.say(401, code="RepoNotFound")
        commit = repo.commits[-1] if commit == "main" else commit
        if commit not in repo.commits:
            return self.say(404, code="RevisionNotFound")
        folder = repo.folder / commit
        if asked.re is FILE:
            return self.file(repo, kind, id, commit, asked["path"])
        match asked["what"]:
            case None | "revision":
                return self.say_json({
                    "id": id, "sha": commit, "private": repo.private, "gated": repo.gated, "tags": [], "downloads": 0, "likes": 0,
                    "cardData": _card(folder), "siblings": [{"rfilename": name} for name in _files(folder)],
                })  # fmt: skip
            case "tree":
                return self.tree(
                    folder, asked["path"] or "", self.query.get("recursive", ["false"])[0].lower() == "true"
                )
            case _:
                paths = parse_qs(self.body.decode()).get("paths", [])
                return self.say_json([_entry(folder, path) for path in paths if (folder / path).exists()])

    def tree(self, folder: Path, below: str, recursive: bool) -> None:
        top = folder / below
        if not top.is_dir():
            return self.say(404, code="EntryNotFound")
        found = top.rglob("*") if recursive else top.iterdir()
        return self.say_json([_entry(folder, path) for path in sorted(str(path.relative_to(folder)) for path in found)])

    def file(self, repo: Repo, kind: str, id: str, commit: str, path: str) -> None:
        if repo.gated and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self.say(401, code="GatedRepo")
        file = repo.folder / commit / path
        if not file.is_file():
            return self.say(404, code="EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_hash(file)}"'}
        if not path.endswith(LARGE):
            return self.say_file(file, headers)
        address = f"http://localhost:{self.hub.storage.server_port}/{kind}/{id}/{commit}/{path}?Signature=signed"
        linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{_hash(file)}"'}
        return self.say(302, headers={**headers, **linked, "Location": address})


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: str) -> dict[str, Any]:
    file = folder / path
    if file.is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
    size = file.stat().st_size
    if not path.endswith(LARGE):
        return {"type": "file", "path": path, "size": size, "oid": _hash(file)}
    return {
        "type": "file",
        "path": path,
        "size": size,
        "oid": "1" * 40,
        "lfs": {"oid": _hash(file), "size": size, "pointerSize": 134},
    }


def _hash(file: Path) -> str:
    """A large file's SHA-256, or the name that git gives a small one."""
    content = file.read_bytes()
    if file.name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _card(folder: Path) -> dict[str, Any]:
    """The YAML that README.md begins with."""
    readme = folder / "README.md"
    parts = readme.read_text(encoding="utf-8").split("---\n") if readme.is_file() else []
    return YAML(typ="safe").load(parts[1]) if len(parts) > 2 else {}

"""The hub of tests/hub_server.py that also takes uploads: repositories are made, large files put, commits sent.

It speaks the protocol of huggingface_hub 1.33 as that sends it where Xet is switched off (HF_HUB_DISABLE_XET=1): the validation
of a card, preupload, git-lfs's batch and verify, single puts to the storage host, and commits as NDJSON.
"""

import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import ModelCard

from tests.hub_server import LARGE, Hub, HubItself, Repo, Storage

WRITE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>preupload|commit|settings)(/main)?")
LFS = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<what>batch|verify)")
MARKED = ".gitattributes"


class WritableHub(Hub):
    """Takes what the owner of `token` sends to `org`."""

    def __init__(self, folder: Path, org: str = "team", token: str = "hf_" + "mayWrite") -> None:
        self.org, self.token = org, token
        self.objects: dict[str, bytes] = {}  # large files that have come whole, by SHA-256
        self.stalled: set[str] = set()  # large files, by SHA-256, of which the storage reads a little and no more while they stand here
        super().__init__(folder)

    def handlers(self):
        return {"hub": _HubItself, "storage": _Storage}

    def files(self, id: str) -> dict[str, bytes]:
        """What a repository holds now."""
        repo = self.repos["model", id]
        top = repo.folder / repo.commits[-1]
        return {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file() and path.name != MARKED}

    def sent(self, ending: str) -> list[Any]:
        """The requests of a method and path that end so."""
        return [seen for seen in self.seen if f"{seen.method} {seen.path}".endswith(ending)]

    def begin(self, id: str, *, private: bool) -> Repo:
        """A repository as the hub makes one."""
        repo = self.repos["model", id] = Repo(self.folder / "model" / id, token=self.token, private=private)
        self.advance(repo, {MARKED: b"*.safetensors filter=lfs\n"}, [])
        return repo

    def advance(self, repo: Repo, added: dict[str, bytes], deleted: list[str]) -> str:
        """The commit that adds and deletes these files."""
        name = hashlib.sha1(repr((len(repo.commits), sorted(added), deleted)).encode()).hexdigest()
        if repo.commits:
            shutil.copytree(repo.folder / repo.commits[-1], repo.folder / name)
        for path, content in added.items():
            (repo.folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (repo.folder / name / path).write_bytes(content)
        for path in deleted:
            (repo.folder / name / path).unlink()
        repo.commits.append(name)
        return name


class _HubItself(HubItself):
    hub: WritableHub

    def do_PUT(self) -> None:
        self.begin()

    def answer(self) -> None:
        path = self.url_path
        asked = WRITE.fullmatch(path) or LFS.fullmatch(path)
        if self.command == "GET" or not (asked or path in ("/api/repos/create", "/api/validate-yaml")):
            return super().answer()
        if path == "/api/validate-yaml":
            return self.validate(self.json()["content"])
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.say(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if asked is None:
            return self.create(**self.json())
        repo = self.hub.repos["model", asked["id"]]
        match asked["what"]:
            case "preupload":
                return self.say_json({"files": [self.mode(repo, file) for file in self.json()["files"]]})
            case "batch":
                return self.say_json({"transfer": "basic", "objects": [self.action(asked["id"], it) for it in self.json()["objects"]]})
            case "verify":
                return self.say(200 if self.json()["oid"] in self.hub.objects else 404)
            case "settings":
                repo.private = self.json()["visibility"] == "private"
                return self.say_json({})
            case _:
                return self.commit(repo, asked["id"])

    def json(self) -> Any:
        return json.loads(self.body)

    def create(self, name: str, organization: str, visibility: str, **_: Any) -> None:
        if organization != self.hub.org:
            return self.say(403)
        self.hub.begin(f"{organization}/{name}", private=visibility == "private")
        return self.say_json({"url": f"{self.hub.endpoint}/{organization}/{name}"})

    def validate(self, content: str) -> None:
        """As far as the client can say: metadata that it reads back, scores too, and a licence by its identifier."""
        try:
            license = ModelCard(content).data.license
            if license and not re.fullmatch(r"[a-z0-9.-]+", license):
                raise ValueError('"license" must be one of [apache-2.0, mit, ...]')
        except ValueError as error:
            return self.say(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode())
        return self.say_json({"errors": [], "warnings": []})

    def mode(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        place = repo.folder / repo.commits[-1] / file["path"]
        large = file["path"].endswith(LARGE)
        oid = None
        if place.is_file():
            content = place.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content)
            oid = (hashlib.sha256(content) if large else git).hexdigest()
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def action(self, id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        put = f"http://localhost:{self.hub.storage.server_port}/lfs/{wanted['oid']}?Signature=signed"
        return {**wanted, "actions": {"upload": {"href": put}, "verify": {"href": f"{self.hub.endpoint}/{id}.git/info/lfs/objects/verify"}}}

    def commit(self, repo: Repo, id: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"]["parentCommit"] != repo.commits[-1]:
            return self.say(412)
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        added |= {line["value"]["path"]: self.hub.objects[line["value"]["oid"]] for line in lines if line["key"] == "lfsFile"}
        name = self.hub.advance(repo, added, [line["value"]["path"] for line in lines if line["key"] == "deletedFile"])
        return self.say_json({"commitOid": name, "commitUrl": f"{self.hub.endpoint}/{id}/commit/{name}"})


class _Storage(Storage):
    hub: WritableHub

    def do_PUT(self) -> None:
        self.begin()

    def read_body(self) -> bytes:
        """Also one that comes in chunks; stops reading where that is planted."""
        oid = self.path.partition("?")[0].rpartition("/")[2]
        if oid in self.hub.stalled:
            self.rfile.read(1000)
            while oid in self.hub.stalled:
                time.sleep(0.05)
            self.close_connection = True
            return b""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return super().read_body()
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self) -> None:
        if self.command != "PUT":
            return super().answer()
        oid = self.url_path.rpartition("/")[2]
        if "Signature" not in self.query or hashlib.sha256(self.body).hexdigest() != oid:
            return self.say(403)
        self.hub.objects[oid] = self.body
        return self.say(200)

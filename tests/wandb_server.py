"""A W&B server on loopback, for tests: as much of its protocol as the client of wandb 0.31 speaks, and what was sent to it.

W&B's own server comes as a container image alone, and no package on PyPI stands in for one.
"""

import base64
import gzip
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

KEY = "k" * 40


@dataclass
class Run:
    """One run as the server has it."""

    about: dict[str, Any] = field(default_factory=dict)  # what UpsertBucket said last, nothing forgotten
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # of each streamed file, by line
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The run's config without the client's own entries."""
        return {name: entry["value"] for name, entry in json.loads(self.about["config"]).items() if name != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged rows in the order of their lines."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary."""
        return json.loads(self.lines["wandb-summary.json"][0])

    def table(self, name: str) -> dict[str, Any]:
        """The newest table of a name: its columns and data."""
        return json.loads(self.files[self.summary[name]["path"]])


class Wandb:
    """The server and what came to it; `key` is the one that it takes, `stall` the seconds before each answer."""

    def __init__(self) -> None:
        self.key, self.stall = KEY, 0.0
        self.runs: dict[str, Run] = {}
        self.seen: list[tuple[str, str, str]] = []  # method, path, body
        self.lock = Lock()
        handler = type("Handler", (_Handler,), {"wandb": self})
        self.server = _Server(("127.0.0.1", 0), handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the client speak to this server, every second."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": self.key, "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}

    @property
    def sent(self) -> str:
        """All that was sent, as one text."""
        return "\n".join(f"{method} {path} {body}" for method, path, body in self.seen)


@contextmanager
def serving():
    """A Wandb that answers while the context lasts."""
    wandb = Wandb()
    Thread(target=wandb.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield wandb
    finally:
        wandb.server.shutdown()
        wandb.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is none of the server's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: Wandb

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.begin()

    def do_POST(self) -> None:
        self.begin()

    def do_PUT(self) -> None:
        self.begin()

    def begin(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = unquote(urlsplit(self.path).path)
        with self.wandb.lock:
            self.wandb.seen.append((self.command, path, body.decode("utf-8", "replace")))
        time.sleep(self.wandb.stall)
        if self.command == "PUT" and path.startswith("/storage/"):
            _, _, run, name = path.split("/", 3)
            self.wandb.runs[run].files[name] = body
            self.say({})
        elif not self.allowed():
            self.say({"errors": [{"message": "user is not logged in"}]}, 401)
        elif path == "/graphql":
            self.say({"data": self.answer(json.loads(body))})
        elif path.endswith("/file_stream"):
            self.stream(path.split("/")[-2], json.loads(body))
        else:
            self.say({}, 404)

    def allowed(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        return kind == "Basic" and base64.b64decode(given).decode() == f"api:{self.wandb.key}"

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        given, runs = asked.get("variables") or {}, self.wandb.runs
        match asked.get("operationName"):
            case "RunResumeStatus":
                run = runs.get(given["name"])
                return {"model": {"id": "p", "name": given["project"], "entity": ENTITY, "bucket": run and _known(given["name"], run)}}
            case "UpsertBucket":
                with self.wandb.lock:
                    inserted = given["name"] not in runs
                    run = runs.setdefault(given["name"], Run())
                run.about |= {name: value for name, value in given.items() if value is not None}
                project = {"id": "p", "name": run.about["project"], "entity": ENTITY}
                bucket = {**_known(given["name"], run), "description": None, "sweepName": None, "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.wandb.address}/storage/{given['run']}/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
            case "CreateArtifact":  # a table's second copy: answered as one that is here already, so that the file alone comes
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
                return {"createArtifact": {"artifact": artifact}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case _:
                return {"viewer": {"id": "v", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}, "email": ""}}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.wandb.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(file, {})
            lines |= {chunk["offset"] + place: line for place, line in enumerate(chunk["content"])}
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
        self.say({})

    def say(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ENTITY = {"id": "e", "name": "me"}


def _known(name: str, run: Run) -> dict[str, Any]:
    """What the server says of a run that it knows."""
    return {
        "id": name, "name": name, "displayName": run.about.get("displayName"), "config": run.about.get("config", "{}"),
        "tags": run.about.get("tags", []), "notes": None, "wandbConfig": "{}",
        "historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "summaryMetrics": run.lines.get("wandb-summary.json", {}).get(0, "{}"),
    }  # fmt: skip

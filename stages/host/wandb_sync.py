"""Runs sent to Weights & Biases by the client's own sync: as they come, or when `mathmind sync` asks for it.

A run is recorded offline also where tracking is `online`; the client's live sync sends what comes, from a process of its own. So
a server that is slow, gone or refuses costs the record nothing.
"""

import fcntl
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.processes import die_with_parent
from stages.host.launcher import locked
from stages.host.tracking import WANDB

RUNNING, SAID = "running.lock", "sync.log"  # beside a record: what its tracker holds, and what its sync says
AGAIN = 60  # seconds after which a server that was out of reach is worth asking again
CLIENT = (sys.executable, "-B", "-m", "wandb")
PATIENCE = {  # where the caller sets none; the client's own would be hours
    "WANDB_X_GRAPHQL_RETRY_MAX": "1",
    "WANDB_X_GRAPHQL_TIMEOUT_SECONDS": "10",
    "WANDB_X_FILE_TRANSFER_RETRY_MAX": "2",
    "WANDB_X_FILE_STREAM_RETRY_MAX": "5",
}


def environment(home: Path) -> dict[str, str]:
    """For the client: everything below the repository's wandb/, and no reports of its own about itself."""
    return {"WANDB_ERROR_REPORTING": "false", "WANDB_DATA_DIR": str(home / WANDB), "WANDB_SILENT": "false"}


class Sender:
    """The client's live sync of one run's record, which ends when the record does and all of it is sent."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self._start()

    def _start(self) -> None:
        self.began = time.monotonic()
        self.process = start_sync(self.home, [self.folder], self.folder / SAID, live=True)

    def look(self) -> None:
        """Starts it anew, now and then, where it gave up."""
        if self.process.poll() is not None and time.monotonic() - self.began > AGAIN:
            self._start()

    def end(self, seconds: float) -> str | None:
        """Waits for what is left to be sent; says why it is not."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"it was still on its way after {seconds} s"
        return None if is_sent(self.folder) else reason((self.folder / SAID).read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class Synced:
    """What a sync did or would do, as names of run folders below wandb/."""

    sent: list[str]
    waiting: list[str]  # with dry_run: what would be sent
    running: list[str]  # their stages have not ended
    unreadable: list[str]  # a killed tracker wrote nothing into them, or their disk lost it


def sync(home: Path, *, dry_run: bool) -> Synced:
    """Sends every record that has ended and was not sent; InputError where the server takes none of it, or not all."""
    if not (home / WANDB).is_dir():
        return Synced([], [], [], [])
    with locked(home / WANDB / "sync.lock", "mathmind sync: waiting for another one"):
        folders = [folder for folder in sorted((home / WANDB).glob("offline-run-*")) if not is_sent(folder)]
        running = [folder for folder in folders if is_running(folder)]
        waiting = [folder for folder in folders if folder not in running and is_readable(folder)]
        unreadable = [folder for folder in folders if folder not in running and folder not in waiting]
        sent: list[Path] = []
        said = "" if dry_run else _send(home, waiting, unreadable)
        if not dry_run:
            sent, waiting = [folder for folder in waiting if is_sent(folder)], [folder for folder in waiting if not is_sent(folder)]
    if said and waiting:
        raise InputError(f"{len(waiting)} of {len(sent) + len(waiting)} runs are not sent: {reason(said)}; then run it again")
    return Synced(*([folder.name for folder in folders] for folders in (sent, waiting, running, unreadable)))


def told(synced: Synced) -> list[str]:
    """The same in sentences."""
    lines = [f"sent {name}" for name in synced.sent] + [f"would send {name}" for name in synced.waiting]
    lines += [f"{name} is left until its stage ends" for name in synced.running]
    lines += [f"{name} holds nothing that can be read: remove {WANDB / name}" for name in synced.unreadable]
    return lines or ["everything recorded is sent"]


def _send(home: Path, waiting: list[Path], unreadable: list[Path]) -> str:
    """One call of the client for all; a damaged record, for which it sends none, is put aside and it is called again."""
    while waiting:
        log = home / WANDB / SAID
        start_sync(home, waiting, log).wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        damaged = [folder for folder in waiting if f'Failed to read "{WANDB / folder.name}"' in said]
        if not damaged:
            return said
        for folder in damaged:
            waiting.remove(folder)
            unreadable.append(folder)
    return ""


def start_sync(home: Path, folders: list[Path], log: Path, *, live: bool = False) -> subprocess.Popen:
    """The client's own command, which ends with this process and says what it does in a log."""
    command = [*CLIENT, *(("beta", "sync", "--live") if live else ("sync",)), *(str(folder.relative_to(home)) for folder in folders)]
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not the recording client's process
    with log.open("w") as said:
        return subprocess.Popen(
            command, cwd=home, env=PATIENCE | own | environment(home), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip


def record_of(folder: Path) -> Path | None:
    """The file in a run's folder that holds all of the run."""
    return next(folder.glob("*.wandb"), None)


def is_sent(folder: Path) -> bool:
    """By the client's own mark."""
    return any(folder.glob("*.wandb.synced"))


def is_readable(folder: Path) -> bool:
    """Is there anything in the record at all; its first block is written a second after the run began."""
    record = record_of(folder)
    return record is not None and record.stat().st_size > 0


def is_running(folder: Path) -> bool:
    """Does a tracker still write to it: what is sent half is marked as sent, and the rest would stay here."""
    if not (folder / RUNNING).is_file():
        return False
    with (folder / RUNNING).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def reason(said: str) -> str:
    """Why the client did not send, from what it said, in a sentence with what to do."""
    errors = [line for line in said.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
    text = "\n".join(errors)
    server = re.search(r"https?://[^/\s\"]+", text) or re.search(r"credentials for (\S+)", said)
    if "No API key" in said:
        return "there is no key: set WANDB_API_KEY, or run `wandb login`"
    if re.search(r"\b40[13]\b", text):
        return "the server refuses the key: set WANDB_API_KEY to a valid one, or run `wandb login --relogin`"
    if re.search(r"giving up|refused|no such host|timeout|deadline", text, re.IGNORECASE):
        return f"{server[server.lastindex or 0] if server else 'the server'} is out of reach: mend the network, or WANDB_BASE_URL"
    last = (errors or said.strip().splitlines() or ["the client said nothing"])[-1]
    return re.sub(r"^(wandb: )?(ERROR:?|Error:) ", "", last.strip())

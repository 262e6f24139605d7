"""Runs recorded for Weights & Biases: on the disk, whatever the mode; sending is another process's (wandb_sync)."""

import fcntl
import hashlib
import os
from pathlib import Path

from stages.harness.errors import InputError
from stages.host.run_files import COLUMNS, Ended, Figures, config
from stages.host.tracking import UPLOAD, WANDB, Followed
from stages.host.wandb_sync import RUNNING, Sender, environment, is_readable

FLUSH = 1.0  # seconds until a logged row is on the disk
LOGGED = "logged"  # beside a record: the last step in it


def run_id(run: Followed) -> str:
    """The same for a killed run and the one that goes on with it: what it is made of, and the experiment that asked."""
    return hashlib.sha256("\n".join((run.experiment, run.stage, run.key)).encode()).hexdigest()[:16]


class WandbRun:
    """One run's record, and with `online` the process that sends it as it comes."""

    def __init__(self, run: Followed) -> None:
        home = Path(run.home)
        (home / WANDB).mkdir(exist_ok=True)
        os.environ |= environment(home)
        import wandb

        id = run_id(run)
        self.last = max((_last_step(folder) for folder in (home / WANDB).glob(f"offline-run-*-{id}")), default=-1)
        self.run = wandb.init(
            project=run.project, id=id, resume="allow",
            name=f"{run.experiment}/{run.stage}"[:128], group=run.experiment[:128], job_type=run.stage,
            tags=sorted({run.profile[:64], run.experiment[:64]}), config=config(run), settings=settings(home),
        )  # fmt: skip
        self.folder = Path(self.run.dir).parent
        if not self.folder.is_relative_to(home):  # the client goes elsewhere where it may not write
            raise InputError(f"{WANDB}/ takes no new run: free some space, or mend its permissions")
        self.held = (self.folder / RUNNING).open("w")  # until this process ends
        fcntl.flock(self.held, fcntl.LOCK_EX)
        self.table = wandb.Table
        self.sender = Sender(home, self.folder) if run.wandb == "online" else None

    def rows(self, rows: dict[int, Figures]) -> None:
        """Logs the rows after the last one logged, but for the newest, which may still gain figures."""
        if self.sender:
            self.sender.look()
        self._note()  # what was logged at the look before this one is surely on the disk
        for step in sorted(rows)[:-1]:
            self._log(step, rows[step])

    def end(self, status: int, ended: Ended | None) -> None:
        """Logs what is left, ends the run, and has it sent where that is asked for."""
        if ended:
            for step, figures in sorted(ended.curve.items()):
                self._log(step, figures)
            if ended.completions:
                self.run.log({"completions": self.table(columns=list(COLUMNS), data=ended.completions, allow_mixed_types=True)})
            self.run.config.update(ended.config)
            self.run.summary.update(ended.summary)
        self.run.finish(exit_code=status)
        self._note()
        if not is_readable(self.folder):
            raise InputError(f"{WANDB}/{self.folder.name} holds nothing: free some space on its disk")
        if self.sender and (trouble := self.sender.end(UPLOAD)):
            raise InputError(f"not sent: {trouble}; `mathmind sync` sends it")

    def _log(self, step: int, figures: Figures) -> None:
        if step > self.last and figures:
            self.run.log(figures, step=step, commit=True)
            self.last = step

    def _note(self) -> None:
        (self.folder / LOGGED).write_text(str(self.last))


def settings(home: Path):
    """The client's, so that it says nothing of the host, the user, git, the code or the packages, and asks nothing of a network."""
    import wandb

    return wandb.Settings(
        mode="offline", root_dir=str(home), silent=True, console="off", host="mathmind", username="mathmind", email="",
        program="mathmind", x_executable="python", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
        label_disable=True, x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_disable_viewer=True,
        x_save_requirements=False, x_transaction_log_flush_interval=FLUSH,
    )  # fmt: skip


def _last_step(folder: Path) -> int:
    try:
        return int((folder / LOGGED).read_text())
    except (OSError, ValueError):
        return -1

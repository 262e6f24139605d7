"""Event files for TensorBoard: one folder a stage of an experiment, which holds its last run."""

import sys
import time
from pathlib import Path

from stages.host.run_files import Ended, Figures
from stages.host.tracking import EVENTS, Followed, as_folder


class EventFile:
    """One run's event file, named by its key: the library's own names carry the host's."""

    def __init__(self, run: Followed) -> None:
        sys.modules["torch"] = None  # tensorboardX loads it where it can: seconds and memory for nothing
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        del sys.modules["torch"]
        self.scalar, self.event = summary.scalar, Event
        folder = Path(run.home) / EVENTS / as_folder(run.experiment) / as_folder(run.stage)
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.writer = RecordWriter(str(folder / f"events.out.tfevents.{run.key}"))
        self.writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self.had: dict[int, set[str]] = {}
        self.unflushed = True

    def rows(self, rows: dict[int, Figures]) -> None:
        """Writes each figure that came since."""
        for step, figures in sorted(rows.items()):
            had = self.had.setdefault(step, set())
            for name in sorted(figures.keys() - had):
                value = self.scalar(name.replace(".", "/"), figures[name])
                self.writer.write(self.event(wall_time=time.time(), step=step, summary=value).SerializeToString())
                had.add(name)
                self.unflushed = True
        if self.unflushed:
            self.writer.flush()
            self.unflushed = False

    def end(self, status: int, ended: Ended | None) -> None:
        """Writes what only the finished curve has, and the scores."""
        if ended:
            self.rows(ended.curve)
            scores = ended.summary.get("scores", {})
            self.rows({0: {f"scores.{name}": value for name, value in scores.items() if isinstance(value, (int, float))}})
        self.writer.close()

"""Training curves as CSV files: one row a logged step, the same columns in every row, and no clock."""

import csv
import json
from pathlib import Path

# Clocks, what says nothing, and an average over the steps since a resumed run began.
LEFT_OUT = ("runtime", "per_second", "total_flos", "step_time", "epoch", "num_tokens", "train_loss")
FIRST = ("loss", "eval_loss", "reward", "lr")
LIVE = "curve.jsonl"  # beside the checkpoints, where who follows a run reads it


class Curve:
    """Collects figures by step and writes them with six significant digits."""

    def __init__(self, live: Path | None = None) -> None:
        """`live` is a file that gets each row as it comes, as JSON; one of an earlier run is begun anew."""
        self.rows: dict[int, dict[str, float]] = {}
        self.live = live
        if live:
            live.write_bytes(b"")

    def add(self, step: int, **figures: float) -> None:
        """Adds figures to a step's row; figures of the same step join one row."""
        self.rows.setdefault(step, {}).update(figures)
        if self.live:
            with self.live.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")

    def add_log(self, step: int, log: dict[str, object]) -> None:
        """Adds what a Hugging Face trainer logs, without its clocks, with `learning_rate` called lr as everywhere."""
        self.add(step, **{
            name.replace("learning_rate", "lr").replace("/", "."): value
            for name, value in log.items()
            if isinstance(value, (int, float)) and name != "step" and not any(part in name for part in LEFT_OUT)
        })  # fmt: skip

    def write(self, path: Path) -> None:
        """Writes the rows in order of step and the columns in one order; a figure that a step lacks stays empty."""
        found = {name for row in self.rows.values() for name in row}
        columns = [name for name in FIRST if name in found] + sorted(found.difference(FIRST))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *columns])
            for step, row in sorted(self.rows.items()):
                writer.writerow([step, *(f"{row[name]:.6g}" if name in row else "" for name in columns)])


def recorder(curve: Curve, title: str, steps: int):
    """A trainer callback that fills the curve and shows progress."""
    from contextlib import ExitStack

    from transformers import TrainerCallback

    from stages.harness.progress import progress

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.stack = ExitStack()
            self.advance = self.stack.enter_context(progress(title, steps))
            self.figures: dict[str, float] = {}
            for log in state.log_history:  # a resumed run brings the rows of the steps before
                curve.add_log(log["step"], log)
            self.advance(state.global_step)

        def on_step_end(self, args, state, control, **_):
            self.advance(**self.figures)

        def on_log(self, args, state, control, logs=None, **_):
            curve.add_log(state.global_step, logs or {})
            self.figures = {name: logs[name] for name in ("loss", "reward") if name in (logs or {})}

        def on_train_end(self, args, state, control, **_):
            self.stack.close()

    return Recorder()

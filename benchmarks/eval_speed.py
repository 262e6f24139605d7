"""How long the whole test set takes by vLLM at the shape of the report's model, and several models one after another.

    python benchmarks/eval_speed.py VOCABULARY --models 5 --json FILE

The stage eval answers 1,319 questions greedily with 256 tokens each: weights are random, so that no answer ends before. Each model is a
process of its own, as in the graph, and starts its own engine, or one on each of --gpus; --gpus 1 2 has all models asked by one, then by
two. --set eval.batch_size=660 ... changes parameters of report-h200; that many prompts are each engine's.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from report_shape import make_inputs, run_alone, usual_options
from training_speed import gpu

TOKENS = 256  # of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--set", nargs="+", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--shrink", action="store_true", help="a model of a few weights, to try this script")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        changes = ["eval.engine=vllm", f"eval.max_new_tokens={TOKENS}", "eval.subset=null", *asked.changes]
        chosen = usual_options(changes=changes)
        make_inputs(chosen, "transformers", asked.vocabulary, asked.shrink, TOKENS)
        Path("base/chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")  # one way to ask
        models, started = [], time.monotonic()
        for gpus in sorted(asked.gpus * asked.models):
            begun = time.monotonic()
            run_alone("eval", chosen, check=True, gpus=gpus)
            record = json.loads(Path("scratch/stage.json").read_text())
            row = {"whole_seconds": round(time.monotonic() - begun, 1), "answering_seconds": record["answering_seconds"], "tokens": record["tokens"]}
            row |= {"level": record.get("level", "bitwise"), "tokens_per_second": round(row["tokens"] / row["answering_seconds"])}
            models.append({"gpus": record.get("engines", 1)} | row)
            print(json.dumps(models[-1]), flush=True)
        figures = {"command": sys.argv[1:], "gpu": gpu(), "all_seconds": round(time.monotonic() - started, 1), "models": models}
    print(json.dumps(figures["all_seconds"]))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

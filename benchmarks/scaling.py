"""QLoRA at the shape of the report's model on one GPU and on more: tokens a second, the same losses, the same bytes again.

    python benchmarks/scaling.py VOCABULARY --gpus 1 2 --json FILE

For each number of GPUs the recipe's 8 rows an update, dealt out over them, and 8 rows for each of them, which is another recipe. Rates
are of the median update. `apart` is by how much the recipe's losses differ at most from those on the first number of GPUs, as a share of
them; `again`, whether a second run of the recipe gave the same adapter. Stages run as on a host of their own, by the launcher of ranks.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from report_shape import make_inputs, row_of, usual_options, write_params
from training_speed import HERE, gpu, operations

RECIPE = 8  # rows an update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vocabulary", type=lambda text: Path(text).absolute())
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--once", action="store_true", help="leave out the second run of the recipe")
    parser.add_argument("--shrink", action="store_true", help="a model of a few weights, to try this script")
    parser.add_argument("--set", nargs="+", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    asked = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        chosen = usual_options(steps=asked.steps)
        sources, values = make_inputs(chosen, "transformers", asked.vocabulary, asked.shrink)
        architecture = values["base_model"]["architecture"]
        for gpus in asked.gpus:
            for batch in sorted({RECIPE, RECIPE * gpus}):
                settings = HERE | {"per_device_batch": str(batch), "accumulation": "1"}
                chosen.changes = [*(f"qlora.{key}={value}" for key, value in settings.items()), *asked.changes]
                section = write_params(chosen, "transformers", sources)["qlora"]
                row = {"gpus": gpus, "rows_an_update": batch, **row_of("qlora", chosen, section, processes=gpus)}
                if batch == RECIPE and gpus > 1 and "losses" in row:
                    row["apart"] = apart(row, rows[0]) if rows else None
                    row |= {} if asked.once else {"again": again(chosen, section, gpus)}
                if rate := row.get("steady_tokens_per_second"):
                    row["useful_tflops_a_gpu"] = round(rate * operations(architecture) / gpus / 1e12)
                    row["times_as_fast"] = round(rate / rows[0]["steady_tokens_per_second"], 3) if rows else 1
                rows.append(row)
                print(json.dumps(row), flush=True)
                if asked.json:
                    asked.json.write_text(json.dumps({"command": sys.argv[1:], "gpu": gpu(), "rows": rows}, indent=2) + "\n")


def apart(row: dict, first: dict) -> float:
    return max(abs(ours / theirs - 1) for ours, theirs in zip(row["losses"], first["losses"], strict=True))


def again(chosen, section: dict, gpus: int) -> bool:
    """Whether a second run gives the first one's adapter, byte for byte."""
    weights = Path("qlora/adapter_model.safetensors")
    before = weights.rename("before.safetensors").read_bytes()
    row_of("qlora", chosen, section, processes=gpus)
    return weights.read_bytes() == before


if __name__ == "__main__":
    main()

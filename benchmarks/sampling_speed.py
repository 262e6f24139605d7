"""How fast vLLM samples at the shape of the report's model, and where a step of it goes, by torch's profiler.

    python benchmarks/sampling_speed.py --completions 16 64 --json FILE
    python benchmarks/sampling_speed.py --completions 660 --tokens 256 --greedy --invariant --cache-gib 100 --json FILE
    python benchmarks/sampling_speed.py --engine '{"attention_config": {"backend": "FLASH_ATTN"}}' --json FILE

Random weights, prompts of 80 to 160 random tokens, all drawn to the end: four completions of each as grpo draws them (min_p, a seed each, the
log-probability of what is drawn), or one as eval answers (--greedy). Seconds of two runs after one that warms up, whose tokens must be the
same; then a hundred steps under the profiler, the prompts' among them: how long the GPU was at work, and by which kernels.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from prepare_mix import ROOT
from report_shape import shape_config

from stages.harness.params import read_params
from stages.harness.run_stage import determinism

KINDS = {  # of kernels, by a part of their names, the first that fits
    "attention, the cache's new entries": ("flash", "attention", "attend"),
    "products": ("nvjet", "gemm", "splitK", "cutlass"),
    "norms, rotary angles, activation": ("norm", "rotary", "act_and_mul"),
    "sampling": ("min_p", "softmax", "ranks", "gumbel", "ArgMax"),
}
STEPS = 100  # under the profiler
END = 151_643  # <|endoftext|>, at which no completion here ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--completions", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--invariant", action="store_true", help="batch-invariant, as eval is")
    parser.add_argument("--engine", type=json.loads, default={}, help="settings of vLLM's, as JSON")
    parser.add_argument("--cache-gib", type=float, default=40.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ |= determinism(ROOT)
    from stages.inference.vllm_engine import Vllm, set_up_vllm, start_vllm

    set_up_vllm(batch_invariant=asked.invariant)
    import torch

    with tempfile.TemporaryDirectory() as folder:
        shape_config(read_params(ROOT / "params/report-h200.yaml")["base_model"]["architecture"], eos_token_id=END).save_pretrained(folder)
        llm = start_vllm(
            Path(folder), Vllm(kv_cache_gib=asked.cache_gib, cuda_graphs=True), requests=max(asked.completions), max_model_len=1024,
            max_num_batched_tokens=16_384, logprobs_mode="raw_logprobs", generation_config="vllm", dtype="bfloat16", load_format="dummy",
            enable_prefix_caching=not asked.greedy, enable_chunked_prefill=not asked.greedy, **asked.engine,
        )  # fmt: skip
    rows = []
    for count in asked.completions:
        sample(llm, count, 32, asked.greedy)
        (first, drawn), (second, again) = (sample(llm, count, asked.tokens, asked.greedy) for _ in range(2))
        row = {"completions": count, "tokens": asked.tokens, "seconds": [first, second], "same": drawn == again, **profiled(llm, count, asked.greedy)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps({"command": sys.argv[1:], "gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM takes its time to end


def sample(llm, count: int, tokens: int, greedy: bool) -> tuple[float, list[list[int]]]:
    """Seconds for so many completions of so many tokens, and the tokens."""
    from vllm import SamplingParams

    draw = random.Random(0)
    each = 1 if greedy else 4  # completions of a prompt
    prompts = [[draw.randrange(1000, 100_000) for _ in range(draw.randrange(80, 160))] for _ in range(-(-count // each))]
    how = {"temperature": 0.0} if greedy else {"temperature": 1.0, "min_p": 0.1, "logprobs": 0, "flat_logprobs": True}
    seeds = [None] * count if greedy else range(count)
    params = [SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, seed=seed, **how) for seed in seeds]
    llm.reset_prefix_cache()
    begun = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompts[place // each]} for place in range(count)], params, use_tqdm=False)
    return round(time.perf_counter() - begun, 3), [list(output.outputs[0].token_ids) for output in outputs]


def profiled(llm, count: int, greedy: bool) -> dict:
    """Milliseconds a step: the whole, the GPU at work, and each kind of kernel; with the ten kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        sample(llm, count, STEPS, greedy)
    ran = sorted((event.time_range.start, event.time_range.end, event.name) for event in profiler.events() if event.device_type.name == "CUDA")
    busy = end = 0.0
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    kernels: dict[str, float] = {}
    for begun, ended, name in ran:
        busy += max(0.0, ended - max(begun, end))
        end = max(end, ended)
        kinds[next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")] += ended - begun
        kernels[name[:100]] = kernels.get(name[:100], 0.0) + ended - begun
    longest = sorted(kernels.items(), key=lambda kernel: -kernel[1])[:10]
    whole = ran[-1][1] - ran[0][0]
    return {
        "step_ms": by_step(whole), "busy_ms": by_step(busy), "kinds_ms": {kind: by_step(spent) for kind, spent in kinds.items()},
        "longest_ms": {name: by_step(spent) for name, spent in longest},
    }  # fmt: skip


def by_step(microseconds: float) -> float:
    return round(microseconds / 1000 / STEPS, 3)


if __name__ == "__main__":
    main()

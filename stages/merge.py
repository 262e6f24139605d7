"""merge: folds an adapter into the base's 16-bit weights, so that engines without adapters can run the model.

The adapter was trained on the base as its stage loaded it (4-bit for qlora); it is merged into the base's own weights in
32-bit arithmetic, and the sum is rounded once. On tokens drawn at random the merged model must give other logits than
the base, and those of the adapter on the base but for the rounding.
"""

from pathlib import Path
from typing import Literal

from stages.corpus.tokenizer_files import keep_sentencepiece
from stages.harness import measures
from stages.harness.arithmetic import use_portable_arithmetic
from stages.harness.errors import InputError
from stages.harness.params import StageParams

PROBE = (2, 64)  # sequences, tokens each
MOST_DRIFT = 0.25  # of what the adapter changes; bfloat16 loses the most


class Params(StageParams):
    """float16 has the finer steps that small models need; bfloat16 the range that large ones were trained in."""

    dtype: Literal["float16", "bfloat16"]


def run(p: Params, *, base: Path, adapter: Path, out: Path) -> None:
    """Writes a model folder: safetensors, the adapter's tokenizer with its template, its generation config."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} holds no adapter (no adapter_config.json): run the stage that writes it")
    use_portable_arithmetic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    probe = torch.randint(model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        of_base = model(probe).logits
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        of_adapter = adapted(probe).logits
        merged = adapted.merge_and_unload().to(getattr(torch, p.dtype))
        of_merged = merged.float()(probe).logits
    learned, drift = (of_adapter - of_base).norm().item(), (of_merged - of_adapter).norm().item()
    if learned == 0:
        raise InputError(f"{adapter} changes nothing in {base}: its training did nothing, so there is nothing to merge")
    if not drift <= MOST_DRIFT * learned:  # nor NaN, as from a weight beyond float16's range
        raise InputError(f"{adapter} merged into {base} is not what it was: rounding to {p.dtype} moves its logits by "
                         f"{drift / learned:.0%} of what was learned: choose another merge.dtype")  # fmt: skip

    merged.generation_config = GenerationConfig.from_pretrained(adapter)
    merged.to(getattr(torch, p.dtype)).save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
    keep_sentencepiece(base, out)
    measures.note(drift=round(drift / learned, 6))

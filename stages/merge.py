"""merge: folds an adapter into the base's 16-bit weights, so that engines without adapters can run the model.

The adapter was trained on the base as its stage loaded it (4-bit for qlora); it is merged into the base's own weights in
32-bit arithmetic, and the sum is rounded once.
"""

from pathlib import Path
from typing import Literal

from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.params import StageParams


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
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    changed = sum(not torch.equal(before[name], weight) for name, weight in merged.named_parameters())
    if not changed:
        raise InputError(f"{adapter} changes no weight of {base}: its training did nothing, so there is nothing to merge")

    merged.generation_config = GenerationConfig.from_pretrained(adapter)
    merged.to(getattr(torch, p.dtype)).save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
    measures.note(tensors_changed=changed)

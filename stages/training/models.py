"""Loading models and adapters for training, and leaving behind a folder that says by itself how it is to be asked."""

import logging
from pathlib import Path

from stages.corpus.chat_format import without_marks
from stages.corpus.marks import STOP_TOKENS
from stages.harness.arithmetic import use_portable_arithmetic
from stages.harness.errors import InputError

# Every linear layer of a Qwen2 block: the report does not say, and QLoRA's paper adapts all (Dettmers et al. 2023, 4).
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# On CPUs with AVX512-BF16 bitsandbytes looks for a kernel on the hub and warns that there is none: we use none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_base(folder: Path, *, nf4: bool = False):
    """The base model, in 4-bit NF4 with double quantisation if asked; bf16 on a GPU, fp32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _require_model(folder)
    use_portable_arithmetic()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization if nf4 else None)
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes (0.50.2) repacks 4-bit weights for each evaluation and back, rounding
        # their scales on the way: training would depend on the processor, and a resumed run on where it was killed.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(folder: Path, template: Path, *, ends_with: str):
    """The base's tokenizer with a chat template; `ends_with` is the token that ends an answer in this template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.eos_token = ends_with
    return tokenizer


def lora(rank: int, alpha: int, dropout: float):
    """A LoRA configuration over every linear layer."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LINEAR_LAYERS),
        task_type="CAUSAL_LM",
    )


def save_adapter(model, tokenizer, out: Path) -> None:
    """Writes adapter, tokenizer with its template, and a generation config that knows both stop tokens.

    The template loses its training marks, which other readers of it do not know; the model card that peft adds says
    nothing of ours and is left out.
    """
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    model.save_pretrained(out, selected_adapters=["default"])  # grpo holds a second one, to measure its divergence
    tokenizer.save_pretrained(out)
    save_generation_config(tokenizer, out)
    (out / "README.md").unlink(missing_ok=True)


def save_generation_config(tokenizer, out: Path) -> None:
    """Writes the stop tokens: the one that the template ends an answer with first, the other after it."""
    from transformers import GenerationConfig

    stops = sorted(STOP_TOKENS, key=lambda token: token != tokenizer.eos_token)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in stops]
    GenerationConfig(eos_token_id=ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)


def _require_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json): run the stage that writes it")

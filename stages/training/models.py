"""Loading models and adapters for training, and leaving behind a folder that says by itself how it is to be asked."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus.chat_format import without_marks
from stages.corpus.tokenizer_files import keep_sentencepiece, marks_of
from stages.harness import ranks
from stages.harness.arithmetic import use_portable_arithmetic
from stages.harness.errors import InputError
from stages.harness.params import StageParams
from stages.training.sharding import load_shared_out

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Every linear layer of a block of Qwen2, Llama or Gemma: the report does not say, and QLoRA's paper adapts all (Dettmers et al. 2023, 4).
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# On CPUs with AVX512-BF16 bitsandbytes looks for a kernel on the hub and warns that there is none: we use none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Lora(StageParams):
    """The adapter's size: `alpha / rank` scales it."""

    rank: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)


class Transformers:
    """The backend `transformers`: the libraries' own models, on a GPU where there is one."""

    lends = True  # its models can use weights that lie elsewhere
    grpo_arguments: dict[str, int] = {}  # that its GRPOConfig has beyond trl's

    def __init__(self, precision: Precision) -> None:
        self.precision = precision

    def load_base(self, folder: Path, *, nf4: bool = False, lent: bool = False, sharded: bool = False):
        """The base model, in 4-bit NF4 if asked (Dettmers et al. 2023); on the CPU if its weights are to be lent.

        sharded: of each layer this process keeps its share.
        """
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        require_model(folder)
        use_portable_arithmetic()
        dtype = getattr(torch, DTYPES[self.precision])
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.float32 if sharded else torch.uint8,  # the same bits: only what looks like floats is shared out
        )
        if sharded:
            model = load_shared_out(folder, dtype, quantization if nf4 else None)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=_gpu() if torch.cuda.is_available() and (nf4 or not lent) else None,
                quantization_config=quantization if nf4 else None,
            )
        for module in model.modules():
            # On a CPU with AVX512-BF16, bitsandbytes (0.50.2) repacks 4-bit weights for each evaluation and back, rounding
            # their scales on the way: training would depend on the processor, and a resumed run on where it was killed.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def new_adapter(self, model, size: Lora):
        """The model with an untrained adapter on every linear layer."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=size.rank,
            lora_alpha=size.alpha,
            lora_dropout=size.dropout,
            target_modules=list(LINEAR_LAYERS),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)

    def held_adapter(self, model, folder: Path):
        """The model with the adapter of a folder, to be trained further."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def _gpu() -> str:
    """Of several processes each has its own."""
    return "cuda" if ranks.size() == 1 else f"cuda:{ranks.local_rank()}"


def in_32_bits(model) -> None:
    """Widens the adapter: trl narrows that of a 4-bit base to bf16, which loses small updates and cannot scale losses."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def frozen_hash(model) -> int:
    """A hash of the base's weights, computed where they lie: of each the exclusive or of its 64-bit words."""
    import torch

    def words(weight):
        data = weight.detach().contiguous().flatten().view(torch.uint8)
        return data.view(torch.int64) if data.numel() % 8 == 0 else data

    held = (weight for name, weight in model.named_parameters() if "lora_" not in name)
    return hash(tuple(torch.hash_tensor(words(weight)).item() for weight in held))


def load_tokenizer(folder: Path, template: Path, *, ends_with: str):
    """The base's tokenizer with a chat template; `ends_with` is the token that ends an answer in this template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.eos_token = ends_with
    return tokenizer


def save_adapter(model, tokenizer, base: Path, out: Path) -> None:
    """Writes adapter, tokenizer with its template, and a generation config that knows both stop tokens of the base.

    The template loses its training marks, which other readers of it do not know; the model card that peft adds says
    nothing of ours and is left out.
    """
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    model.save_pretrained(out, selected_adapters=["default"])  # grpo holds a second one, to measure its divergence
    tokenizer.save_pretrained(out)
    save_generation_config(tokenizer, marks_of(base).stops, out)
    keep_sentencepiece(base, out)
    (out / "README.md").unlink(missing_ok=True)


def save_generation_config(tokenizer, stops: Sequence[str], out: Path) -> None:
    """Writes the stop tokens: the one that the template ends an answer with first, the other after it."""
    from transformers import GenerationConfig

    ids = [tokenizer.convert_tokens_to_ids(token) for token in sorted(stops, key=lambda token: token != tokenizer.eos_token)]
    GenerationConfig(eos_token_id=ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)


def require_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model (no config.json): run the stage that writes it")

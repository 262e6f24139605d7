"""The backend `unsloth`: its kernels and hand-written backward passes under the same trl trainers, on a CUDA GPU.

Read in unsloth 2026.10.7: an import rewrites trl's trainers and transformers' Qwen2 for the whole process, adapters must be made
before a trainer is (it ignores `peft_config`), and sums are cut into pieces by how much memory happens to be free, unless told.
"""

import inspect
import os
from pathlib import Path

from stages.harness.errors import InputError
from stages.training.models import DTYPES, LINEAR_LAYERS, Lora, Precision, require_model


class Unsloth:
    """Loads models from folders alone; what it compiles lies below `scratch`."""

    lends = False
    grpo_arguments = {"unsloth_grpo_mini_batch": 1, "unsloth_logit_chunk_multiplier": 4}

    def __init__(self, precision: Precision, seed: int, checkpointing: bool, max_length: int, scratch: Path) -> None:
        """Imports unsloth: nothing of trl, transformers or peft may have been imported before.

        Raises InputError where there is no CUDA GPU, and for 32 bits, which it does not train in.
        """
        import torch

        if not torch.cuda.is_available():
            raise InputError("params.yaml: backend: unsloth needs a CUDA GPU and there is none: use transformers")
        if precision == "fp32":
            raise InputError("params.yaml: backend: unsloth trains in bf16 or fp16: set precision to one of them, or use transformers")
        folder = scratch.resolve() / "compiled"
        os.environ |= {
            "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
            "UNSLOTH_DISABLE_AUTO_PADDING_FREE": "1",  # rows as trl pads them
            "UNSLOTH_CE_LOSS_TARGET_GB": "1",
            "UNSLOTH_DATASET_NUM_PROC": "0",
        }
        import unsloth  # noqa: F401

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # its import forgets one set before
        self.precision, self.seed, self.checkpointing, self.max_length = precision, seed, checkpointing, max_length

    def load_base(self, folder: Path, *, nf4: bool = False, lent: bool = False, sharded: bool = False):
        """See Transformers; its weights stay its own."""
        import torch
        from unsloth import FastLanguageModel

        require_model(folder)
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder.resolve()),  # a relative one it would look up
            use_exact_model_name=True,
            local_files_only=True,
            max_seq_length=self.max_length,
            dtype=getattr(torch, DTYPES[self.precision]),
            load_in_4bit=nf4,  # NF4, scales quantised too
            use_gradient_checkpointing=self.checkpointing,
            offload_embedding=False,
            fix_tokenizer=False,
        )
        return model

    def new_adapter(self, model, size: Lora):
        """See Transformers."""
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            model,
            r=size.rank,
            lora_alpha=size.alpha,
            lora_dropout=size.dropout,
            target_modules=list(LINEAR_LAYERS),
            use_gradient_checkpointing=self.checkpointing,
            random_state=self.seed,
        )
        model.peft_config["default"].auto_mapping = None  # a mark of its own, which other readers need not know
        return model

    def held_adapter(self, model, folder: Path):
        """See Transformers."""
        from peft import PeftModel
        from unsloth import FastLanguageModel

        _score_uncompiled()
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        return FastLanguageModel.patch_peft_model(model, self.checkpointing)


def _score_uncompiled() -> None:
    """Takes the compiler off grpo's log-probabilities: torch 2.11 was seen to simplify their cut sizes for minutes without an end."""
    from unsloth_zoo import rl_replacements

    name = "chunked_hidden_states_selective_log_softmax"
    setattr(rl_replacements, name, inspect.unwrap(getattr(rl_replacements, name)))

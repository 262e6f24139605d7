"""The backend `unsloth`: its kernels and hand-written backward passes under the same trl trainers, on a CUDA GPU."""

import os
from pathlib import Path

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.training.models import DTYPES, LINEAR_LAYERS, Lora, Precision, nf4_settings, require_model


class Unsloth:
    """Loads models from folders alone; what it compiles lies below `scratch`."""

    lends = False

    def __init__(self, precision: Precision, seed: int, checkpointing: bool, max_length: int, scratch: Path) -> None:
        """Imports unsloth, which rewrites trl's trainers: nothing of trl may have been imported before.

        Raises InputError where there is no CUDA GPU.
        """
        import torch

        if not torch.cuda.is_available():
            raise InputError("params.yaml: backend: unsloth needs a CUDA GPU and there is none: use transformers")
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "unsloth")
        import unsloth  # noqa: F401

        self.precision, self.seed, self.checkpointing, self.max_length = precision, seed, checkpointing, max_length

    def load_base(self, folder: Path, *, nf4: bool = False, lent: bool = False):
        """See Transformers; its weights stay its own."""
        import torch
        from transformers import BitsAndBytesConfig
        from unsloth import FastLanguageModel

        require_model(folder)
        dtype = getattr(torch, DTYPES[self.precision])
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=self.max_length,
            dtype=dtype,
            load_in_4bit=nf4,
            quantization_config=BitsAndBytesConfig(**nf4_settings(dtype)) if nf4 else None,
            use_gradient_checkpointing=self.checkpointing,
            use_exact_model_name=True,
            fix_tokenizer=False,
            random_state=self.seed,
            local_files_only=True,
        )
        return model

    def new_adapter(self, model, size: Lora):
        """See Transformers."""
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            r=size.rank,
            lora_alpha=size.alpha,
            lora_dropout=size.dropout,
            target_modules=list(LINEAR_LAYERS),
            use_gradient_checkpointing=self.checkpointing,
            random_state=self.seed,
        )

    def held_adapter(self, model, folder: Path):
        """See Transformers."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        config = read_json(folder / "adapter_config.json")
        size = Lora(rank=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"])
        model = self.new_adapter(model, size)
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return model

"""A frozen base that several processes share out (FSDP2): each keeps a part of every layer, and has the whole of one or two at a time.

The adapter is small and whole in every process. It is trained as where each process has the whole base: the same updates to the last bit,
the same checkpoints, the same files in the end.
"""

import os
from pathlib import Path

from stages.harness import measures, ranks
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json
from stages.harness.ranks import SHARDED
from stages.training.memory import Needs


def asked() -> bool | None:
    """What run.sharded says; None where the memory of the GPU is to decide."""
    return {"true": True, "false": False}.get(os.environ.get(SHARDED, ""))


def is_shared_out(needs: Needs, memory_gib: float) -> bool:
    """Whether the base is: where run.sharded leaves it open, where the whole of it would leave no room for a single row."""
    if ranks.size() == 1:
        return False
    shared = ranks.told(not needs.fits(memory_gib) if asked() is None else asked())
    measures.note(sharded=shared)
    return shared


def load_shared_out(folder: Path, dtype, quantization):
    """The base of a model folder with each layer shared out as soon as it is read, so that no process has more of it than that one whole.

    dtype: of its weights. quantization: a BitsAndBytesConfig for 4 bits, or None. Raises InputError where the files lack a weight.
    """
    import torch
    from accelerate import init_empty_weights
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.quantizers import AutoHfQuantizer

    device = torch.device("cuda", ranks.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    placed = {"": device}
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = folder
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if quantization:
        model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        model.hf_quantizer.preprocess_model(model, dtype=dtype, device_map=placed)
    weights, decoder = _Weights(folder, dtype, device), model.get_decoder()
    parts = list(decoder.layers)
    if not config.get_text_config().tie_word_embeddings:  # one matrix that serves at both ends stays whole
        parts += [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {module: f"{name}." for name, module in model.named_modules()}
    for part in parts:
        weights.fill(part, names[part])
        _share_out(part)
    weights.fill(decoder, names[decoder])
    model.tie_weights()
    fully_shard(decoder, ignored_params={weight for weight in decoder.parameters() if not is_part(weight)})  # the last norm too
    if quantization:
        model.hf_quantizer.postprocess_model(model)
    model.hf_device_map = placed
    return model.eval()


def alongside(trainer) -> None:
    """Has the adapter trained by data parallelism, beside a base that is shared out and is to be left alone."""
    model = trainer.model
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    if any(map(is_part, frozen.values())):
        model._ddp_params_and_buffers_to_ignore = list(frozen)
        trainer.accelerator.device_placement = False  # all lies where it belongs, and what is shared out cannot be moved


def whole(weight):
    """A weight of which processes may have a share each; all must ask."""
    return weight.full_tensor() if is_part(weight) else weight


def is_part(weight) -> bool:
    """Whether this process has but a share of a weight."""
    return hasattr(weight, "full_tensor")


class _Weights:
    """The weights of a model folder, each read when it is asked for."""

    def __init__(self, folder: Path, dtype, device) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        files = [safe_open(folder / name, framework="pt") for name in names]
        self.dtype, self.device = dtype, device
        self.folder, self.held = folder, {weight: file for file in files for weight in file.keys()}

    def fill(self, part, prefix: str) -> None:
        """Reads those weights of a module that are not there yet, in 4 bits where it is a 4-bit one."""
        from bitsandbytes.nn import Params4bit
        from torch import Tensor
        from torch.nn import Parameter

        for name, empty in list(part.named_parameters()):
            if not empty.is_meta:
                continue
            if prefix + name not in self.held:
                raise InputError(f"params.yaml: run.sharded: {self.folder} has no weight by the name {prefix}{name}: set it to false")
            weight = self.held[prefix + name].get_tensor(prefix + name).to(self.device, self.dtype)
            if isinstance(empty, Params4bit):
                weight = Params4bit(weight, **empty.__dict__).to(self.device)  # where it is quantised
            owner, _, own = name.rpartition(".")
            setattr(part.get_submodule(owner), own, Parameter(weight, requires_grad=False) if type(weight) is Tensor else weight)


def _share_out(part) -> None:
    """Leaves this process its part of a module's weights; 4-bit ones are whole again, with their scales, whenever the module computes."""
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
    from torch.distributed.fsdp import fully_shard

    quantised = [module for module in part.modules() if isinstance(module, Linear4bit)]
    told = [(module.weight.quant_type, module.weight.compress_statistics) for module in quantised]
    fully_shard(part, reshard_after_forward=True)
    for module, (kind, twice) in zip(quantised, told, strict=True):
        module.weight.quant_type, module.weight.compress_statistics = kind, twice  # peft asks

    def bring_scales(*_) -> None:
        for module in quantised:  # each would do it itself, amid what is compiled
            fix_4bit_weight_quant_state_from_module(module)

    part.register_forward_pre_hook(bring_scales)

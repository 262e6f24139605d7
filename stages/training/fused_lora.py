"""A linear layer's base and its LoRA adapter (Hu et al. 2021) in one matrix product, where peft makes two and adds them.

The adapter's second matrix lies beside the base's, and what its first made of the input beside the input: [x, s A x] @ [W, B]^T is
W x + s B A x. So no output is written and read once more for its adapter's sake, and in the backward pass one product gives the
gradients by the input and by A x. The sum is rounded once, where peft's is rounded three times.
"""

from types import MethodType

ALIGNED = 8  # numbers of 16 bits: rows of a matrix whose length is no multiple of it are read slowly


def fuse_lora(model, *, nf4: bool) -> None:
    """Has linear layers of a peft model make one product of base and adapter where a gradient is asked for; it pays in compiled layers.

    nf4: those in 4 bits too, whose values are made for it, and kept for the backward pass unless the layer is recomputed.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer
    from torch.nn import Linear

    forward = _forward()
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, Linear) and (nf4 or not isinstance(module.base_layer, Linear4bit)):
            module.forward = MethodType(forward, module)


def _forward():
    """What stands for peft's forward, where torch is there to be derived from."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from torch.nn.functional import linear, pad

    class Joined(torch.autograd.Function):
        """x: (..., in); inner: (..., rank); weight: (out, in), frozen; outer: (out, rank); bias: (out,) or None, frozen."""

        @staticmethod
        def forward(ctx, x, inner, weight, outer, bias):
            # Turned over, which makes a copy: a view of what lies beside the input would keep the input's copy with it.
            ctx.save_for_backward(inner.flatten(0, -2).t().contiguous(), weight, outer)
            return linear(torch.cat([x, inner], -1), torch.cat([weight, outer], 1), bias)

        @staticmethod
        def backward(ctx, by_out):
            turned, weight, outer = ctx.saved_tensors
            # In another order than before, or torch's compiler would keep the forward pass's for this one: a second base in all.
            by_inner, by_x = (by_out @ torch.cat([outer, weight], 1)).split([outer.shape[1], weight.shape[1]], -1)
            return by_x, by_inner, None, (turned @ by_out.flatten(0, -2)).t(), None

    def forward(module, x):
        active = module.active_adapters
        if not torch.is_grad_enabled() or module.disable_adapters or module.merged or len(active) != 1:
            return type(module).forward(module, x)  # of a few tokens, as in generation, the product is cheaper than [W, B]
        (name,), base = active, module.base_layer
        weight = dequantize_4bit(base.weight, base.weight.quant_state) if isinstance(base, Linear4bit) else base.weight
        x = x.to(weight.dtype)
        inner = linear(module.lora_dropout[name](x), module.lora_A[name].weight.to(weight.dtype)) * module.scaling[name]
        outer = module.lora_B[name].weight.to(weight.dtype)
        if missing := -module.r[name] % ALIGNED:
            inner, outer = pad(inner, (0, missing)), pad(outer, (0, missing))
        return Joined.apply(x, inner, weight, outer, base.bias)

    return forward

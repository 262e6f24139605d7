"""Base and adapter in one product: what peft's two give, forwards and backwards, and nothing more in memory for it."""

import pytest

HIDDEN, TOKENS = 256, 96


def made(dtype: str, *, rank: int = 8, alpha: int = 8, dropout: float = 0.0):
    """A Qwen2 of three layers with an adapter that has learnt something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from stages.training.models import LINEAR_LAYERS

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=672)
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LINEAR_LAYERS)))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape) * 0.02
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    return model


def forward(model):
    """A number that all that the model makes of two rows goes into."""
    import torch

    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, TOKENS))
    hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state.float()
    return (hidden * torch.randn(hidden.shape)).sum()


def gradient(model):
    import torch

    return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.requires_grad])


@pytest.mark.parametrize("size", [{}, {"rank": 6, "alpha": 9}, {"dropout": 0.3}])
def test_one_product_gives_what_two_give(size):
    from stages.training.fused_lora import fuse_lora

    found = []
    for fused in (False, True):
        model = made("float32", **size)
        if fused:
            fuse_lora(model, nf4=True)
        loss = forward(model)
        loss.backward()
        found.append((loss.item(), gradient(model)))
    (loss, whole), (fused_loss, fused_whole) = found
    assert fused_loss == pytest.approx(loss, rel=1e-4)
    assert whole.norm() > 1 and (fused_whole - whole).norm() < 1e-5 * whole.norm()


def test_a_switched_off_adapter_leaves_the_base():
    from stages.training.fused_lora import fuse_lora

    model = made("float32")
    with model.disable_adapter():
        alone = forward(model).item()
    fuse_lora(model, nf4=True)
    with model.disable_adapter():
        assert forward(model).item() == alone
    assert forward(model).item() != pytest.approx(alone, rel=1e-3)


def test_where_no_gradient_is_asked_for_peft_answers():
    """As in a look at answers during training: in 16 bits, with nothing that narrows the adapter."""
    import torch

    from stages.training.fused_lora import fuse_lora

    found = []
    for fused in (False, True):
        model = made("bfloat16").eval()
        if fused:
            fuse_lora(model, nf4=True)
        with torch.no_grad():
            found.append(forward(model).item())
    assert found[0] == found[1]


def test_a_4_bit_base_has_the_same_gradient():
    import torch
    from bitsandbytes.nn import Linear4bit

    from stages.training.fused_lora import fuse_lora

    found = []
    for fused in (False, True):
        model = made("float32")
        for module in list(model.modules()):
            if hasattr(module, "base_layer"):
                plain = module.base_layer
                four = Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
                four.load_state_dict(plain.state_dict())
                module.base_layer = four.requires_grad_(False).to("cpu")
                assert four.weight.quant_state is not None
        if fused:
            fuse_lora(model, nf4=True)
        forward(model).backward()
        found.append(gradient(model))
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


def test_a_compiled_block_keeps_no_more_and_loses_no_more():
    """Against its gradient in 32 bits; of what is kept for the backward pass all but the weights counts."""
    import torch

    from stages.training.fused_lora import fuse_lora

    def block(dtype: str, *, fused: bool):
        model = made(dtype)
        if fused:
            fuse_lora(model, nf4=True)
        return model.get_base_model().model.layers[0].mlp

    def loss(block, dtype: str):
        torch.manual_seed(1)
        x = torch.randn(2, TOKENS, HIDDEN).to(getattr(torch, dtype)).requires_grad_()
        return (block(x).float() * torch.randn(x.shape)).sum()

    whole = block("float32", fused=False)
    loss(whole, "float32").backward()
    exact, found = gradient(whole), {}
    for fused in (False, True):
        torch._dynamo.reset()
        compiled = block("bfloat16", fused=fused)
        compiled.compile(dynamic=True)
        weights = {weight.untyped_storage().data_ptr() for weight in compiled.parameters()}
        kept: dict[int, int] = {}

        def note(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            lost = loss(compiled, "bfloat16")
        lost.backward()
        found[fused] = sum(kept.values()), ((gradient(compiled) - exact).norm() / exact.norm()).item()
    print("bytes kept, error of the gradient: apart", *found[False], "fused", *found[True])
    assert 0 < found[True][0] <= found[False][0]
    assert found[True][1] < 1.2 * found[False][1] < 0.05

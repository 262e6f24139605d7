"""Supervised rows without padding: those of a micro-batch lie one after another, and each attends to itself alone.

An update is that of the padded batch: the same rows, the same sum over the same labels. What differs is the order in which sums are
taken, and that nothing is computed for padding, nor a logit for a token that is not trained.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from math import gcd
from pathlib import Path
from typing import Any

from pydantic import Field

from stages.harness import measures, ranks
from stages.harness.errors import InputError
from stages.harness.params import StageParams
from stages.training.dealing import micro_batches, share_of
from stages.training.fused_lora import fuse_lora
from stages.training.memory import GIB, OPTIMISED_BYTES, OPTIMISED_BYTES_8_BIT, Needs, Shape, choose
from stages.training.sharding import is_shared_out

ATTENTION = "packed"  # its name among transformers' attention functions
CHUNK = 1024  # labels whose logits are in memory at a time
FLASH_FROM = (8, 0)  # compute capability that torch's variable-length attention has kernels for
IGNORED = -100  # the label of a token that is not trained


class Packed(StageParams):
    """What is null is chosen by the memory of the GPU, so that one card always gets the same; the timing record says what it was."""

    rows: int | None = Field(gt=0)  # of a micro-batch; they divide the batch
    recompute: bool | None  # layers in the backward pass, instead of keeping what they computed
    dequantise: bool | None  # qlora: hold the values of the 4-bit weights in 16 bits, where they need not be made again each time
    compile: bool  # layers and loss by torch.compile: faster from the second update on, after half a minute or so
    memory_gib: float | None = Field(gt=0)  # to plan for; null: all that the GPU has


class Padded:
    """Rows as trl pads them, to the longest of each micro-batch."""

    collator = None

    def __init__(self, p, *, sharded: bool = False) -> None:
        self.rows = max(p.per_device_batch // ranks.size(), 1)  # of a process, where they are evaluated
        self.sharded = sharded
        self.arguments: dict[str, Any] = {}

    def prepare(self, model):
        return model

    def adapted(self, model):
        return model


class PackedRows:
    """Rows without padding, in micro-batches that a plan made for the memory of this GPU."""

    def __init__(
        self, p, base: Path, scratch: Path, *, rank: int, longest: int, nf4: bool, beside: float = 0, by_batch: bool = False, whole: bool = False
    ) -> None:
        """p: an Optimisation that has `packed`. longest: tokens of a row; beside: bytes of an engine. What is compiled goes to `scratch`.

        by_batch: rows are seldom as long as they may be; which layers are recomputed is left to each micro-batch (see `make_room`).
        whole: the base is not shared out.
        """
        import torch

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch.resolve() / "compiled")
        if p.backend != "transformers":
            raise InputError("params.yaml: packed rows need backend: transformers: unsloth packs in its own way; or set packed to null")
        batch = p.per_device_batch * p.accumulation
        if p.packed.rows and batch % p.packed.rows:
            raise InputError(f"params.yaml: packed.rows: {p.packed.rows} does not divide the batch of {batch} (per_device_batch x accumulation)")
        memory = p.packed.memory_gib or _memory_gib()
        needs = needs_of(p, base, rank, longest, nf4, beside)
        self.sharded = not whole and is_shared_out(needs, memory)
        if self.sharded and p.packed.dequantise:
            raise InputError("params.yaml: packed.dequantise holds the whole base in 16 bits, of which several processes have a share each "
                             "(run.sharded): set it to null")  # fmt: skip
        needs = replace(needs, shares=ranks.size() if self.sharded else 1)
        self.p, self.strict, self.longest = p.packed, p.strict, longest
        dequantise = False if self.sharded else p.packed.dequantise
        rows = p.packed.rows and gcd(p.packed.rows, share_of(batch))
        by_batch = by_batch and not self.sharded and p.packed.recompute is None
        # A compiled layer that is one graph recomputes within it, else the whole layer is computed again from outside.
        one_graph = p.packed.compile and p.precision != "fp32" and torch.cuda.is_available() and _flash() and not (by_batch or whole or self.sharded)
        given = {"rows": rows, "recompute": True if by_batch else p.packed.recompute, "dequantise": dequantise}
        plan = choose(needs, share_of(batch), memory, **given, attention=one_graph)
        self.layers_kept = partial(needs.layers_kept, memory_gib=memory, dequantise=plan.dequantise)
        if by_batch:
            plan = replace(plan, recompute=self.layers_kept(plan.rows * longest) < needs.shape.layers)
        self.plan = ranks.told(plan)
        self.by_batch = by_batch and self.plan.recompute
        self.within = self.plan.recompute and one_graph
        self.rows = self.plan.rows
        self.collator = partial(pack, longest=longest)
        self.nf4 = nf4 and not (self.plan.dequantise or self.sharded)
        self.arguments = {
            **micro_batches(batch, self.plan.rows),
            "gradient_checkpointing": self.plan.recompute and not (self.within or self.by_batch),
        }
        measures.note(rows=self.plan.rows, recompute=self.plan.recompute, dequantised=self.plan.dequantise, attention_kept=self.plan.attention)

    def make_room(self, decoder, attention_mask, lent) -> None:
        """Has the first layers recomputed, as many as the tokens of a micro-batch leave no room for.

        attention_mask, (rows, length): 0 where there is no token; lent, (rows,): how many of each row's are another one's, computed
        there. To be called before each forward pass: what a trainer set in between is set anew.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        if not self.by_batch:
            return
        again = partial(checkpoint, use_reentrant=False)
        recomputed = len(decoder.layers) - self.layers_kept(int(attention_mask.sum() - lent.sum()))
        for place, layer in enumerate(decoder.layers):
            layer.gradient_checkpointing = torch.is_grad_enabled() and place < recomputed
            layer._gradient_checkpointing_func = again

    def prepare(self, model):
        """The base, before it gets its adapter, with attention by rows and a loss that is made in pieces."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(ATTENTION, partial(_attend, spread=_spread()))
        AttentionMaskInterface.register(ATTENTION, _mask)
        if self.plan.dequantise:
            model = model.dequantize(model.dtype)
        model.set_attn_implementation(ATTENTION)
        if self.nf4:
            _hold_scales(model)
        if self.p.compile:
            import torch

            torch._inductor.config.deterministic = self.strict
            torch._dynamo.config.optimize_ddp = False  # it would cut a layer's graph in two, to send gradients sooner
            for place, layer in enumerate(model.get_decoder().layers):
                if self.within:
                    layer.forward = _recomputed(layer.forward, keep_attention=place < self.plan.attention)
                if self.sharded:  # what gathers a layer stays outside
                    layer.forward = torch.compile(layer.forward, dynamic=True)
                else:
                    layer.compile(dynamic=True)
        return model

    def adapted(self, model):
        """The base with its adapter, whose products go together with the base's where they are compiled."""
        if self.p.compile and not self.sharded:
            fuse_lora(model, nf4=self.within)
        return model


def _recomputed(forward, *, keep_attention: bool):
    """A layer's forward that keeps its input, and attention's results if asked, and is computed again going back, within its compiled graph."""
    import torch.nn.attention.varlen  # which makes the operation known
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kept = (torch.ops.torch_attn._varlen_attn.default,) if keep_attention else ()

    def policy(_, operation, *args, **others):
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.MUST_RECOMPUTE

    def again(*args, **others):
        return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy), **others)

    return again


def _hold_scales(model) -> None:
    """Brings the scales of 4-bit weights to 32 bits once, which are in 8 bits else and brought there for each product: the same bits."""
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.quant_state.nested:
            state = module.weight.quant_state
            state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested, state.state2, state.offset = False, None, None


def layout(p, base: Path, scratch: Path, *, nf4: bool = False, answers: int = 1) -> Padded | PackedRows:
    """How the rows of sft, qlora or orpo lie in memory, and the base; to be asked before anything is on the GPU.

    answers: of a row, each as long as max_length with its prompt; several seldom are.
    """
    longest = answers * p.max_length
    if p.packed:
        return PackedRows(p, base, scratch, rank=p.lora.rank, longest=longest, nf4=nf4, by_batch=answers > 1)
    return Padded(p, sharded=ranks.size() > 1 and is_shared_out(needs_of(p, base, p.lora.rank, longest, nf4), _memory_gib()))


def needs_of(p, base: Path, rank: int, longest: int, nf4: bool, beside: float = 0) -> Needs:
    """What a training by these parameters (its optimizer and precision) needs memory for; see Needs for the others."""
    optimised = OPTIMISED_BYTES_8_BIT if p.optimizer.endswith("8bit") else OPTIMISED_BYTES
    return Needs(Shape.read(base), rank, nf4, 4 if p.precision == "fp32" else 2, longest, CHUNK, beside, optimised=optimised)


def _memory_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else float("inf")


def pack(rows: Sequence[dict[str, list[int]]], *, longest: int) -> dict[str, Any]:
    """One row of all tokens, (1, total); positions start anew with each row, whose first token is nobody's label.

    places: of the tokens whose next one is a label. cu_seq_lens: where rows begin and the last ends, (rows + 1). max_length: of any row
    of the run, so that nothing compiled depends on it.
    """
    import numpy as np
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    tokens, labels = (
        torch.from_numpy(np.concatenate(column).astype(np.int64))
        for column in ([row["input_ids"] for row in rows], [row.get("labels", row["input_ids"]) for row in rows])
    )
    labels[bounds[:-1].long()] = IGNORED
    return {
        "input_ids": tokens[None],
        "labels": labels[None],
        "places": (labels[1:] != IGNORED).nonzero()[:, 0],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, lent=None, *, spread, **others):
    """transformers' attention function: each packed row causally to itself; without bounds (in generation) as `sdpa` does.

    query: (1, heads, total, head size); key and value: the same with their own heads. Returns (1, total, heads, head size). lent: where
    rows begin with tokens of others (see logprobs.py), which then are keys and values of theirs too, before their own: `spread` says so.
    """
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    if lent is not None:
        key, value = spread(key, *lent), spread(value, *lent)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bounds = cu_seq_lens_q, others["cu_seq_lens_k"]
    if _has_flash(query):
        from torch.nn.attention.varlen import varlen_attn

        by_token = (heads.transpose(1, 2)[0] for heads in (query, key, value))
        out = varlen_attn(*by_token, *bounds, others["max_length_q"], others["max_length_k"], scale=scaling, window_size=(-1, 0))
        return out[None], None
    asked, known = (each.diff().tolist() for each in bounds)
    rows = zip(query.split(asked, dim=2), key.split(known, dim=2), value.split(known, dim=2), strict=True)
    out = [_attend_row(*row, scaling) for row in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _attend_row(query, key, value, scaling):
    """The last tokens of a row, of which keys and values know all."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    if query.shape[2] == key.shape[2]:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(query.shape[2], key.shape[2]), scale=scaling)


def _spread():
    """OfAllRows as a function, where torch is there to be derived from; a layer in which the class is made would be compiled in pieces."""
    import torch

    class OfAllRows(torch.autograd.Function):
        """Keys or values of computed tokens, (1, heads, computed, size), as all rows have them, one row after another.

        places: of each row's tokens among the computed ones. own, (computed,); again, (borrowers, computed): where among all rows' tokens
        a computed one is in its own row, and in those that borrowed it, -1 where no more have. So a gradient is read from where its parts
        are and summed in one order; adding each part to where it belongs would sort all of them first.
        """

        @staticmethod
        def forward(ctx, heads, places, own, again):
            ctx.save_for_backward(own, again)
            return heads[:, :, places]

        @staticmethod
        def backward(ctx, by_all):
            own, again = ctx.saved_tensors
            by_heads = by_all[:, :, own]
            for place in again:
                by_heads = by_heads + torch.where((place < 0)[:, None], 0, by_all[:, :, place.clamp(min=0)])
            return by_heads, None, None, None

    return OfAllRows.apply


def _has_flash(query) -> bool:
    return query.is_cuda and query.dtype.itemsize == 2 and _flash()


def _flash() -> bool:
    import torch

    return torch.cuda.get_device_capability() >= FLASH_FROM


def _mask(*args, attention_mask=None, **others):
    """None for packed rows, which know their bounds; in generation, which pads, that of `sdpa`."""
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **others)


def answer_loss(hidden, head, labels, places, *, compiled: bool):
    """Summed cross entropy of the labels in nats, how many of them had the largest logit, and the sum of entropies in nats.

    hidden: (1, total, hidden); head: (vocabulary, hidden); labels: (1, total), of the token itself; places: of the tokens before those
    that are trained (see `pack`). The gradient is made in the forward pass.
    """
    return _chunked_loss().apply(hidden[0], head, labels[0, places + 1], places, compiled)


@cache
def _chunked_loss():
    """An autograd function, where torch is there to be derived from."""
    import torch

    class ChunkedLoss(torch.autograd.Function):
        """Summed cross entropy. Its gradient by a chunk's logits is known with them, so neither is made or kept a second time."""

        @staticmethod
        def forward(ctx, hidden, weight, labels, places, compiled):
            measure = _compiled_measure() if compiled else _measure
            weight = weight.to(hidden.dtype)
            chosen = hidden[places]
            grad = torch.empty_like(chosen)
            sums = torch.zeros(3, device=hidden.device)
            for start in range(0, len(places), CHUNK):
                part = slice(start, start + CHUNK)
                found, by_logits = measure(chosen[part] @ weight.t(), labels[part])
                sums += found
                grad[part] = by_logits @ weight
            ctx.save_for_backward(grad, places)
            ctx.shape = hidden.shape
            loss, correct, entropy = (each.clone() for each in sums)
            ctx.mark_non_differentiable(correct, entropy)
            return loss, correct, entropy

        @staticmethod
        def backward(ctx, by_loss, *_):
            grad, places = ctx.saved_tensors
            whole = grad.new_zeros(ctx.shape)
            whole[places] = (grad * by_loss).to(grad.dtype)
            return whole, None, None, None, None

    return ChunkedLoss


def _measure(logits, labels):
    """Sums of loss, hits and entropy over a chunk, (3,), and the gradient of the first by the logits."""
    import torch

    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    chances = (wide - normaliser).exp()
    loss = (normaliser - wide.gather(1, labels[:, None])).sum()
    hits = (wide.argmax(-1) == labels).sum()
    entropy = (normaliser[:, 0] - (chances * wide).sum(-1)).sum()
    here = torch.arange(wide.shape[-1], device=labels.device) == labels[:, None]
    return torch.stack([loss, hits.float(), entropy]), (chances - here.float()).to(logits.dtype)


@cache
def _compiled_measure():
    import torch

    return torch.compile(_measure, dynamic=True)

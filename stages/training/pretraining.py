"""A small Qwen2 trained from nothing on whole documents, by a plain loop."""

import math
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import Field

from stages.corpus.marks import STOP_TOKENS, TEXT_END
from stages.harness import measures, ranks
from stages.harness.arithmetic import read_work_space_once, use_portable_arithmetic, use_strict_kernels
from stages.harness.errors import InputError
from stages.harness.params import StageParams
from stages.harness.progress import progress
from stages.training import checkpoints as kept
from stages.training.curves import LIVE, Curve
from stages.training.dealing import share_of
from stages.training.own_tokenizer import PAD, train_tokenizer
from stages.training.rows import as_tensors, documents_of, in_random_order, pack

BETAS = (0.9, 0.98)
WARMUP_STEPS = 50
NOTE_EVERY = 20  # steps between rows of the curve


class Architecture(StageParams):
    """The size of a Qwen2 model; row lengths that are multiples of 256 let llama.cpp's K-quants apply."""

    hidden: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    ffn: int = Field(gt=0)
    init_std: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    positions: int = Field(gt=0)


class Pretraining(StageParams):
    """What is read, how large the model is, and how its weights are updated."""

    seed: int
    sources: tuple[str, ...] = Field(strict=False)  # whose text is read
    vocab: int = Field(gt=300)
    architecture: Architecture
    precision: Literal["fp32", "bf16"]  # of matrix products; weights and optimizer are held in 32 bits
    strict: bool  # on a GPU: only kernels whose bits come again
    steps: int = Field(gt=0)
    max_length: int = Field(gt=0)  # tokens of a row, which whole documents share; longer documents are left out
    per_device_batch: int = Field(gt=0)  # rows
    prompt_weight: float = Field(ge=0, le=1)  # what the loss of a prompt's token counts; one of its completion counts 1
    lr: float = Field(gt=0)
    decay_share: float = Field(ge=0, le=1)  # of the steps, at the end, over which the rate falls to nothing
    weight_decay: float = Field(ge=0)
    save_every: int = Field(multiple_of=NOTE_EVERY)  # steps; a killed run goes on from there


def pretrain(p: Pretraining, raw: Path, checkpoints: Path, out: Path) -> Curve:
    """Trains tokenizer and model and returns the loss curve; the first process writes their folder."""
    if p.max_length > p.architecture.positions:
        raise InputError(
            f"params.yaml: base_model.max_length: {p.max_length} is more than architecture.positions, "
            f"{p.architecture.positions}: lower the one or raise the other"
        )
    own = share_of(p.per_device_batch)
    mine = slice(own * ranks.rank(), own * (ranks.rank() + 1))  # rows of a batch
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    documents = list(documents_of(raw, p.sources))
    tokenizer = train_tokenizer((prompt + completion for prompt, completion in documents), p.vocab)
    rows = pack(tokenizer, documents, p.max_length, p.prompt_weight)
    packed = sum(len(row["seq_lengths"]) for row in rows)

    if ranks.size() > 1 and len(rows) < p.per_device_batch:
        raise InputError(f"params.yaml: base_model.sources fill {len(rows)} rows, fewer than per_device_batch: let one process train, or read more")
    ranks.meet()
    use_portable_arithmetic()
    use_strict_kernels(p.strict)
    read_work_space_once()
    torch.manual_seed(p.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(p, tokenizer).to(device)  # drawn on the CPU: the same start on every device
    forward = model if ranks.size() == 1 else torch.nn.parallel.DistributedDataParallel(model)
    # Fused: its square root is the processor's own; the plain form's is MKL's, which differs between makers.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=p.lr, betas=BETAS, weight_decay=p.weight_decay, fused=True
    )
    curve, tokens, done, running = Curve(checkpoints / LIVE if ranks.is_first() else None), 0, 0, []
    if checkpoint := kept.where_all_go_on(checkpoints):
        told = kept.load(Path(checkpoint), model, optimizer)
        tokens, done = told["tokens"], told["done"]
        for row in told["curve"]:
            curve.add(**row)
    batches = in_random_order(rows, p.per_device_batch, p.seed)
    with progress("base-model", p.steps) as advance:
        advance(done)
        for step, rows_of_step in islice(enumerate(batches, 1), done, p.steps):
            rate = p.lr * rate_share(step - 1, p.steps, p.decay_share)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = as_tensors(rows_of_step, tokenizer.token_to_id(PAD))
            tokens += int((batch[2] > 0).sum())
            ids, positions, weights = (part[mine].to(device) for part in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=p.precision == "bf16"):
                logits = forward(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = weighted_loss(logits.float(), ids, weights)
            if ranks.size() > 1:  # so that the mean over processes is that over the tokens of all
                loss = loss * (ranks.size() * float(batch[2][mine].sum() / batch[2].sum()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running.append(loss.detach())
            shown = {}
            if step % NOTE_EVERY == 0 or step == p.steps:  # only here is a GPU waited for
                shown = {"loss": fmean(ranks.everybody(sum(part.item() for part in running) / len(running)))}
                curve.add(step, **shown, lr=rate)
                running = []
            if step % p.save_every == 0 and ranks.is_first():
                curve_so_far = [{"step": step, **row} for step, row in curve.rows.items()]
                kept.save(checkpoints, step, model, optimizer, {"done": step, "tokens": tokens, "curve": curve_so_far})
            advance(**shown)

    if not ranks.is_first():
        return curve
    stop_ids = [tokenizer.token_to_id(token) for token in reversed(STOP_TOKENS)]
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.token_to_id(PAD))
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TEXT_END, pad_token=PAD, model_max_length=p.architecture.positions
    ).save_pretrained(out)
    measures.note(
        tokens=tokens,
        weights=sum(weight.numel() for weight in model.parameters()),
        documents=packed,
        too_long=len(documents) - packed,
    )
    return curve


def weighted_loss(logits, ids, weights):
    """Mean cross-entropy of each token given those before it, in nats, every token counted by its weight."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def rate_share(step: int, steps: int, decay_share: float) -> float:
    """The learning rate at a step as a share of its peak: a short rise, a plateau, a straight fall at the end."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = steps - step
    return min(1.0, left / max(1, math.ceil(steps * decay_share)))


def _model(p: Pretraining, tokenizer):
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

    size = p.architecture
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            intermediate_size=size.ffn,
            max_position_embeddings=size.positions,
            rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
            initializer_range=size.init_std,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(TEXT_END),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
    )

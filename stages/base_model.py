"""base-model: the model that every method starts from.

`pretrain` trains a tokenizer and a small Qwen2 from nothing on the documents that fetch brought; `hub` takes a published
model at a pinned commit. The folder carries no chat template: eval asks a base model in several ways and says which.
"""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus import schemas
from stages.corpus.marks import STOP_TOKENS, TEXT_END, TURN_END, TURN_START
from stages.harness import measures
from stages.harness.arithmetic import use_portable_arithmetic
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, read_rows
from stages.harness.params import StageParams
from stages.harness.progress import progress

PAD = "<|pad|>"
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END, PAD)
# Qwen2's pre-tokenizer: words, single digits, punctuation, line ends (Qwen/Qwen1.5-4B, tokenizer.json).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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


class Params(StageParams):
    """`pretrain` uses everything below it, `hub` only the name."""

    seed: int
    kind: Literal["pretrain", "hub"]
    repo: str | None  # hub: the model's name; its commit stands in params/sources.lock.yaml
    sources: tuple[str, ...] = Field(strict=False)  # pretrain: whose text is read
    vocab: int = Field(gt=300)
    architecture: Architecture
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)
    lr: float = Field(gt=0)
    decay_share: float = Field(ge=0, le=1)  # of the steps, at the end, over which the rate falls to nothing
    weight_decay: float = Field(ge=0)


def run(p: Params, *, raw: Path, sources_lock: Path, out: Path, out_curve: Path) -> None:
    """Writes a model folder (config, weights, tokenizer, generation config) and the loss curve."""
    if p.kind == "hub":
        raise InputError("params.yaml: base_model.kind: hub is not there yet: use pretrain")
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from stages.training.curves import Curve

    texts = list(_texts(raw, p.sources))
    tokenizer = train_tokenizer(texts, p.vocab)
    documents = [encoding.ids for encoding in tokenizer.encode_batch([text + TEXT_END for text in texts])]
    documents = [ids for ids in documents if len(ids) <= min(p.architecture.positions, p.tokens_per_step)]

    use_portable_arithmetic()
    torch.manual_seed(p.seed)
    model = _model(p, tokenizer)
    # Fused: its square root is the processor's own; the plain form's is MKL's, which differs between makers.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=p.lr, betas=BETAS, weight_decay=p.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, p.steps, p.decay_share))
    curve, tokens, running = Curve(), 0, []
    batches = batches_by_length(documents, p.tokens_per_step, p.seed)
    with progress("base-model", p.steps) as advance:
        for step in range(1, p.steps + 1):
            batch = next(batches)
            ids, labels = pad(batch, tokenizer.token_to_id(PAD))
            loss = model(input_ids=ids, labels=labels, attention_mask=(labels != -100).long()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(map(len, batch))
            running.append(loss.item())
            if step % NOTE_EVERY == 0 or step == p.steps:
                curve.add(step, loss=sum(running) / len(running), lr=schedule.get_last_lr()[0])
                running = []
            schedule.step()
            advance(loss=loss.item())

    stop_ids = [tokenizer.token_to_id(token) for token in reversed(STOP_TOKENS)]
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.token_to_id(PAD))
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TEXT_END, pad_token=PAD, model_max_length=p.architecture.positions
    ).save_pretrained(out)
    curve.write(out_curve)
    measures.note(tokens=tokens, weights=sum(weight.numel() for weight in model.parameters()), documents=len(documents))


def train_tokenizer(texts: Sequence[str], vocab: int):
    """A byte-level BPE tokenizer with Qwen2's normaliser and pre-tokenizer, so that llama.cpp reads it as `qwen2`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches_by_length(documents: Sequence[list[int]], tokens: int, seed: int) -> Iterator[list[list[int]]]:
    """Endless batches of at most `tokens` tokens, padding included, of documents of like length, in random order.

    Each pass over the documents draws anew; within a batch lengths differ little, so that little is padding.
    """
    rng = random.Random(seed)
    while True:
        by_length = sorted(documents, key=lambda ids: (len(ids), rng.random()))
        batches, batch = [], []
        for ids in by_length:
            if batch and len(ids) * (len(batch) + 1) > tokens:
                batches.append(batch)
                batch = []
            batch.append(ids)
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


def pad(batch: Sequence[list[int]], pad_id: int):
    """Token ids and labels as tensors (documents, longest); padding has label -100 and is never trained."""
    import torch

    longest = max(map(len, batch))
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in batch])
    labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in batch])
    return ids, labels


def rate_share(step: int, steps: int, decay_share: float) -> float:
    """The learning rate at a step as a share of its peak: a short rise, a plateau, a straight fall at the end."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = steps - step
    return min(1.0, left / max(1, math.ceil(steps * decay_share)))


def _texts(raw: Path, names: Sequence[str]) -> Iterator[str]:
    sources = read_json(raw / "sources.json")
    for name in names:
        if name not in sources:
            raise InputError(f"params.yaml: base_model.sources names {name}, which fetch.sources leaves out: mend one")
        path = raw / name / "rows.jsonl"
        if sources[name]["schema"] == "documents":
            yield from (row["text"] for row in read_rows(path))
        else:
            problems = schemas.problems(path, sources[name]["schema"])
            yield from (f"Question: {problem.question}\nAnswer: {problem.solution}" for problem in problems)


def _model(p: Params, tokenizer):
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

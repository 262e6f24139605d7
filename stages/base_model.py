"""base-model: the model that every method starts from.

`pretrain` trains a tokenizer and a small Qwen2 from nothing on the documents that fetch brought; `hub` takes a published
model at a pinned commit, its weights as they are. The folder carries no chat template: eval asks a base model in several
ways and says which.
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.corpus import hub
from stages.corpus.chat_format import few_shot, render
from stages.corpus.marks import STOP_TOKENS, TEXT_END, TURN_END, TURN_START
from stages.corpus.schemas import Document, MathProblem
from stages.corpus.sources import Sources
from stages.corpus.sources_lock import CONFIGS, Snapshot, is_weights, pinned_model, refuse_own_code
from stages.harness import measures
from stages.harness.arithmetic import use_portable_arithmetic, use_strict_kernels
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json
from stages.harness.params import StageParams
from stages.harness.progress import progress
from stages.training import checkpoints as kept
from stages.training.curves import LIVE, Curve

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
    """`pretrain` uses everything below `repo`, `hub` only `repo`."""

    seed: int
    kind: Literal["pretrain", "hub"]
    repo: str | None  # hub: the model's name; its commit stands in params/sources.lock.yaml
    sources: tuple[str, ...] = Field(strict=False)  # pretrain: whose text is read
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


def run(p: Params, *, raw: Path, sources_lock: Path, checkpoints: Path, out: Path, out_curve: Path) -> None:
    """Writes a model folder (config, weights, tokenizer, generation config) and the loss curve.

    A published model has no curve of ours, so it is empty, and source.json says where the model is from and on what terms.
    """
    if p.kind == "hub":
        if p.repo is None:
            raise InputError("params.yaml: base_model.repo: a hub model needs it, such as Qwen/Qwen1.5-4B")
        take(pinned_model(sources_lock, p.repo), checkpoints, out)
        Curve().write(out_curve)
    else:
        pretrain(p, raw, checkpoints, out).write(out_curve)


def take(source: Snapshot, half: Path, out: Path) -> None:
    """Writes a published model's folder: config and weights untouched, its tokenizer without template and with padding.

    `half` is where the files of a killed run lie. Raises InputError where the model needs code of its own or its
    tokenizer lacks what the methods rely on.
    """
    hub.download(source, half)
    for name in source.files.keys() & set(CONFIGS):
        refuse_own_code(source.repository, name, read_json(half / name))

    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config, tokenizer = AutoConfig.from_pretrained(half), AutoTokenizer.from_pretrained(half)
    except (ValueError, OSError) as error:
        raise InputError(f"{source.repository} is not a model that transformers reads ({str(error).splitlines()[0]}): "
                         "name another in params.yaml's base_model.repo") from None  # fmt: skip
    _complete(tokenizer, source, config.get_text_config().vocab_size)
    for name in source.files:
        if name == "config.json" or is_weights(name):
            hub.keep(half / name, out / name)
    tokenizer.save_pretrained(out)
    stop_ids = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)
    write_json(out / "source.json", {"repo": source.repository.id, "revision": source.commit, **source.pinned.terms})


def _complete(tokenizer, source: Snapshot, vocab: int) -> None:
    """Takes the chat template away and sees to a padding token that ends nothing.

    Qwen pads with <|endoftext|>, which is learnt as an answer's end only where it is not taken for padding. Its
    embedding has rows to spare (Qwen1.5-4B: 151,936 for 151,646 tokens), so that a token more needs no new weights.
    """
    known = tokenizer.get_vocab()
    if missing := [token for token in STOP_TOKENS if token not in known]:
        raise InputError(f"{source.repository} has no token {missing[0]}, with which answers end here: "
                         "name a model with Qwen's tokens in params.yaml's base_model.repo")  # fmt: skip
    tokenizer.chat_template = None
    if tokenizer.pad_token in (None, tokenizer.eos_token, *STOP_TOKENS):
        if PAD not in known and len(tokenizer) >= vocab:
            raise InputError(f"{source.repository} has no token to pad with and none of its {vocab} rows to spare for one: "
                             "name another model in params.yaml's base_model.repo")  # fmt: skip
        tokenizer.add_special_tokens({"pad_token": PAD})


def pretrain(p: Params, raw: Path, checkpoints: Path, out: Path) -> Curve:
    """Trains tokenizer and model, writes their folder and returns the loss curve."""
    if p.max_length > p.architecture.positions:
        raise InputError(
            f"params.yaml: base_model.max_length: {p.max_length} is more than architecture.positions, "
            f"{p.architecture.positions}: lower the one or raise the other"
        )
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    documents = list(_documents(raw, p.sources))
    tokenizer = train_tokenizer((prompt + completion for prompt, completion in documents), p.vocab)
    rows = pack(tokenizer, documents, p.max_length, p.prompt_weight)
    packed = sum(len(row["seq_lengths"]) for row in rows)

    use_portable_arithmetic()
    use_strict_kernels(p.strict)
    torch.manual_seed(p.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(p, tokenizer).to(device)  # drawn on the CPU: the same start on every device
    # Fused: its square root is the processor's own; the plain form's is MKL's, which differs between makers.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=p.lr, betas=BETAS, weight_decay=p.weight_decay, fused=True
    )
    curve, tokens, done, running = Curve(checkpoints / LIVE), 0, 0, []
    if checkpoint := kept.last_whole_checkpoint(checkpoints):
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
            ids, positions, weights = (part.to(device) for part in batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=p.precision == "bf16"):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = weighted_loss(logits.float(), ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running.append(loss.detach())
            shown = {}
            if step % NOTE_EVERY == 0 or step == p.steps:  # only here is a GPU waited for
                shown = {"loss": sum(part.item() for part in running) / len(running)}
                curve.add(step, **shown, lr=rate)
                running = []
            if step % p.save_every == 0:
                curve_so_far = [{"step": step, **row} for step, row in curve.rows.items()]
                kept.save(checkpoints, step, model, optimizer, {"done": step, "tokens": tokens, "curve": curve_so_far})
            advance(**shown)

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


def pack(tokenizer, documents: Sequence[tuple[str, str]], max_length: int, prompt_weight: float) -> list[dict]:
    """Rows of at most `max_length` tokens, each of whole documents: {input_ids, weights, seq_lengths}.

    `weights` says how much the loss of a token counts: the tokens of a completion and its end mark 1, those of a prompt
    `prompt_weight`, and the first of each document nothing, as it does not follow from the document before it.
    """
    from datasets import Dataset
    from trl import pack_dataset

    prompts = tokenizer.encode_batch([prompt for prompt, _ in documents])
    completions = tokenizer.encode_batch([completion + TEXT_END for _, completion in documents])
    columns: dict[str, list] = {"input_ids": [], "weights": []}
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) + len(completion) <= max_length:
            weights = [prompt_weight] * len(prompt) + [1.0] * len(completion)
            columns["input_ids"].append(prompt.ids + completion.ids)
            columns["weights"].append([0.0, *weights[1:]])
    whole = {"batch_size": len(columns["input_ids"])}  # rows are filled from all documents at once
    return pack_dataset(Dataset.from_dict(columns), max_length, strategy="bfd", map_kwargs=whole).to_list()


def in_random_order(rows: Sequence[dict], count: int, seed: int) -> Iterator[list[dict]]:
    """Endless batches of `count` rows; each pass over the rows draws a new order."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        yield from (order[start : start + count] for start in range(0, max(1, len(order) - count + 1), count))


def as_tensors(batch: Sequence[dict], pad_id: int):
    """Token ids, positions and weights as tensors (rows, longest); padding weighs nothing.

    Positions begin anew with each document: transformers reads that as "attend to this document only".
    """
    import torch

    longest = max(len(row["input_ids"]) for row in batch)
    ids, positions, weights = [], [], []
    for row in batch:
        left = longest - len(row["input_ids"])
        ids.append(row["input_ids"] + [pad_id] * left)
        positions.append([place for length in (*row["seq_lengths"], left) for place in range(length)])
        weights.append(row["weights"] + [0.0] * left)
    return torch.tensor(ids), torch.tensor(positions), torch.tensor(weights)


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


def _documents(raw: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    sources = Sources(raw)
    for name in names:
        for text in sources.texts(name):
            match text:
                case Document():
                    yield text.prompt, text.completion
                case MathProblem():
                    yield render(few_shot(()), text.question), f" {text.solution}"


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

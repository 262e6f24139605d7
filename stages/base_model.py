"""base-model: the model that every method starts from.

`pretrain` trains a tokenizer and a small Qwen2 from nothing on the documents that fetch brought; `hub` takes a published
model at a pinned commit, `local` one that the user keeps, its weights as they are. The folder carries no chat template: eval
asks a base model in several ways and says which.
"""

import hashlib
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field

from stages.corpus import hub
from stages.corpus.chat_format import few_shot, render
from stages.corpus.marks import STOP_TOKENS, TEXT_END, TURN_END, TURN_START, Marks
from stages.corpus.schemas import Document, MathProblem
from stages.corpus.sources import Sources
from stages.corpus.sources_lock import CONFIGS, MODEL_FILES, Snapshot, is_weights, pinned_model, refuse_no_weights, refuse_own_code
from stages.corpus.tokenizer_files import QWEN2_PATTERN, keep_sentencepiece, marks_of
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
# Tokens that a family keeps for padding or for nothing: what stands there ends no answer. The unknown token comes last.
UNUSED = (r"<\|finetune_right_pad_id\|>", "<pad>", r"\[PAD\]", r"<\|reserved_special_token_\d+\|>", r"<unused\d+>", "<unk>")
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
    """`pretrain` uses everything below `sha256`, `hub` only `repo`, `local` only `folder` and `sha256`."""

    seed: int
    kind: Literal["pretrain", "hub", "local"]
    repo: str | None  # hub: the model's name; its commit stands in params/sources.lock.yaml
    folder: str | None  # local: a folder below run.local_files with config, safetensors and tokenizer
    sha256: str | None  # local: what its files must be; a run says what they are
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


def run(
    p: Params, *, raw: Path, sources_lock: Path, local_files: Path, checkpoints: Path, out: Path, out_curve: Path
) -> None:
    """Writes a model folder (config, weights, tokenizer, generation config) and the loss curve.

    A model that others made has no curve of ours, so it is empty, and source.json says where the model is from and, where
    it is published, on what terms.
    """
    match p.kind:
        case "hub":
            if p.repo is None:
                raise InputError("params.yaml: base_model.repo: a hub model needs it, such as Qwen/Qwen1.5-4B")
            take_published(pinned_model(sources_lock, p.repo), checkpoints, out)
            Curve().write(out_curve)
        case "local":
            take_local(p, local_files, out)
            Curve().write(out_curve)
        case "pretrain":
            pretrain(p, raw, checkpoints, out).write(out_curve)


def take_published(source: Snapshot, half: Path, out: Path) -> None:
    """Takes the base from the hub; `half` is where the files of a killed run lie. Raises what `take` raises."""
    hub.download(source, half)
    take(str(source.repository), half, source.files, hub.keep, out)
    write_json(out / "source.json", {"repo": source.repository.id, "revision": source.commit, **source.pinned.terms})


def take_local(p: Params, local_files: Path, out: Path) -> None:
    """Takes the base from a folder that the user keeps, after a check that its bytes are the ones the parameters mean.

    Raises InputError where the folder is missing, its hash another or none, and what `take` raises.
    """
    if p.folder is None:
        raise InputError("params.yaml: base_model.folder: a local model needs it, the name of a folder below run.local_files")
    folder, told = local_files / p.folder, f"model {p.folder}"
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: put the model's folder there (run.local_files says where)")
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    refuse_no_weights(told, names)
    files = [name for name in names if name.endswith(MODEL_FILES)]
    if (found := folder_sha256(folder, files)) != p.sha256:
        wants = "names none" if p.sha256 is None else f"wants {p.sha256}"
        raise InputError(f"{folder} has sha256 {found}, params.yaml's base_model.sha256 {wants}: "
                         "get the right files, or write that there")  # fmt: skip
    take(told, folder, files, shutil.copyfile, out)
    write_json(out / "source.json", {"kind": "local", "folder": p.folder, "sha256": found})


def folder_sha256(folder: Path, names: Sequence[str]) -> str:
    """One hash of some files of a folder: that of the lines which `sha256sum` prints for them, sorted by name."""
    lines = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            lines.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return lines.hexdigest()


def take(model: str, folder: Path, names: Sequence[str], place: Callable[[Path, Path], object], out: Path) -> None:
    """Writes the folder of a model that others made: config and weights untouched, its tokenizer without template and with padding.

    `model` is how messages call it, `place` copies or links a file. Raises InputError where the model needs code of its own or
    its tokenizer lacks what the methods rely on.
    """
    for name in set(names) & set(CONFIGS):
        refuse_own_code(model, name, read_json(folder / name))

    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise InputError(f"{model} is not a model that transformers reads ({str(error).splitlines()[0]}): "
                         "name another in params.yaml's base_model") from None  # fmt: skip
    tokenizer.chat_template = None
    tokenizer.init_kwargs.pop("chat_template", None)  # or the files would name one, null
    with TemporaryDirectory() as saved:  # its files say what its class adds
        tokenizer.save_pretrained(saved)
        marks = marks_of(Path(saved), model)
    rows, stop_ids = config.get_text_config().vocab_size, tokenizer.convert_tokens_to_ids(list(marks.stops))
    if without := [token for token, id in zip(marks.stops, stop_ids) if id >= rows]:
        raise InputError(f"{model} has no weights for {without[0]}, with which answers would end: "
                         "name another model in params.yaml's base_model")  # fmt: skip
    _see_to_padding(tokenizer, model, marks, rows)
    _see_to_beginning(tokenizer, model, marks)
    tokenizer.save_pretrained(out)
    for name in names:
        if name == "config.json" or is_weights(name):
            place(folder / name, out / name)
    keep_sentencepiece(folder, out)
    GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)


def _see_to_padding(tokenizer, model: str, marks: Marks, vocab: int) -> None:
    """Gives the tokenizer a padding token that neither ends nor begins anything.

    Qwen pads with <|endoftext|>, which is learnt as an answer's end only where it is not taken for padding. Its
    embedding has rows to spare (Qwen1.5-4B: 151,936 for 151,646 tokens), so that a token more needs no new weights; a
    model without such rows pads with a token that it has no use for.
    """
    known, taken = tokenizer.get_vocab(), {tokenizer.eos_token, tokenizer.bos_token, marks.begin, *marks.stops}
    if tokenizer.pad_token not in (None, *taken) and known[tokenizer.pad_token] < vocab:
        return
    pad = PAD
    if PAD not in known and len(tokenizer) >= vocab:
        unused = [token for form in UNUSED for token in sorted(known) if re.fullmatch(form, token)]
        pad = next((token for token in unused if known[token] < vocab and token not in taken), None)
    if pad is None:
        raise InputError(f"{model} has no token to pad with and none of its {vocab} rows to spare for one: "
                         "name another model in params.yaml's base_model")  # fmt: skip
    tokenizer.add_special_tokens({"pad_token": pad})


def _see_to_beginning(tokenizer, model: str, marks: Marks) -> None:
    """Holds the marks to what the tokenizer does; a bos token that begins no text is none, or a trainer would add it."""
    added, bare = (tokenizer("1", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    begin = tokenizer.convert_tokens_to_ids([marks.begin]) if marks.begin else []
    if added != [*begin, *bare]:
        raise InputError(f"{model}: its tokenizer adds {tokenizer.convert_ids_to_tokens(added)} around a text, and only one token "
                         "before it is known here: name another model in params.yaml's base_model")  # fmt: skip
    if not begin and tokenizer.bos_token is not None:
        tokenizer.bos_token = None


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

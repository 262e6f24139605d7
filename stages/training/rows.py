"""What pretraining reads: whole documents packed into rows, which come in batches in an order that the seed draws."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.corpus.chat_format import few_shot, render
from stages.corpus.marks import TEXT_END
from stages.corpus.schemas import Document, MathProblem
from stages.corpus.sources import Sources


def documents_of(raw: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of every text of some sources."""
    sources = Sources(raw)
    for name in names:
        for text in sources.texts(name):
            match text:
                case Document():
                    yield text.prompt, text.completion
                case MathProblem():
                    yield render(few_shot(()), text.question), f" {text.solution}"


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

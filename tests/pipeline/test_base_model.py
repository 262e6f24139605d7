"""The base model's own training: what shares a row stays apart, and what counts in the loss."""

import pytest

from stages.corpus.marks import TEXT_END
from stages.corpus.procedural import DOCUMENT_KINDS, Limits, pretraining_documents
from stages.training.own_tokenizer import PAD, train_tokenizer
from stages.training.pretraining import weighted_loss
from stages.training.rows import as_tensors, in_random_order, pack
from tests.pipeline.conftest import assert_one_sentence

MAX_LENGTH = 144


@pytest.fixture(scope="module")
def documents():
    shares = {kind: 1 / len(DOCUMENT_KINDS) for kind in DOCUMENT_KINDS}
    limits = Limits(largest=10, factor=5, result=30)
    rows = pretraining_documents(1800, 0, shares, {1: 0.4, 2: 0.4, 3: 0.2}, limits, careless=0.5)
    return [(row["prompt"], row["completion"]) for row in rows]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer((prompt + completion for prompt, completion in documents), 480)


@pytest.fixture(scope="module")
def rows(documents, tokenizer):
    return pack(tokenizer, documents, MAX_LENGTH, prompt_weight=0.25)


def split(row):
    """The documents of a row, each as (ids, weights)."""
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length], row["weights"][start : start + length]
        start += length


def test_rows_hold_every_document_that_fits_once_and_whole(documents, tokenizer, rows):
    encoded = [tokenizer.encode(prompt + completion + TEXT_END).ids for prompt, completion in documents]
    packed = [ids for row in rows for ids, _ in split(row)]
    assert sorted(packed) == sorted(ids for ids in encoded if len(ids) <= MAX_LENGTH)
    assert len(packed) < len(documents), "no document was too long: the test shows nothing about those"
    assert max(len(row["input_ids"]) for row in rows) <= MAX_LENGTH
    assert sum(len(row["input_ids"]) for row in rows) > 0.9 * MAX_LENGTH * len(rows)


def test_completions_count_in_full_prompts_in_part_and_a_documents_first_token_not_at_all(documents, tokenizer, rows):
    told = {prompt + completion: (prompt, completion) for prompt, completion in documents}
    for row in rows[::20]:
        for ids, weights in split(row):
            text = tokenizer.decode(ids, skip_special_tokens=False).removesuffix(TEXT_END)
            prompt, completion = told[text]
            asked = len(tokenizer.encode(prompt).ids)
            assert weights[0] == 0
            assert set(weights[1:asked]) <= {0.25}
            assert set(weights[max(1, asked) :]) == {1.0}
            assert ids[-1] == tokenizer.token_to_id(TEXT_END)


def test_each_pass_takes_every_row_in_a_new_order_and_a_seed_repeats_it(rows):
    def taken(seed, count):
        batches = in_random_order(rows, 8, seed)
        return [id(row) for _ in range(count) for row in next(batches)]

    whole = len(rows) // 8
    first, second = taken(0, 2 * whole)[: whole * 8], taken(0, 2 * whole)[whole * 8 :]
    assert len(set(first)) == whole * 8 and len(set(second)) == whole * 8
    assert first != second and taken(0, 5) == taken(0, 5) != taken(1, 5)
    assert next(in_random_order(rows[:3], 8, 0)), "fewer rows than a batch takes must still make batches"


def test_a_document_in_a_row_is_read_as_if_it_stood_alone(tokenizer, rows):
    """The one test of what transformers makes of positions that begin anew."""
    import torch
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=480, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=64, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    row = next(row for row in rows if len(row["seq_lengths"]) >= 2 and len(row["input_ids"]) < MAX_LENGTH)
    longer = next(other for other in rows if len(other["input_ids"]) == MAX_LENGTH)
    ids, positions, weights = as_tensors([row, longer], tokenizer.token_to_id(PAD))
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        start = 0
        for alone, _ in split(row):
            expected = model(input_ids=torch.tensor([alone])).logits[0]
            torch.testing.assert_close(together[0, start : start + len(alone)], expected, rtol=1e-4, atol=1e-4)
            start += len(alone)
    assert weights[0, start:].sum() == 0 and (ids[0, start:] == tokenizer.token_to_id(PAD)).all()


def test_the_loss_is_the_weighted_mean_of_each_tokens_loss():
    import torch

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    weights = torch.tensor([[0.0, 0.25, 1, 1, 0], [0.0, 1, 0, 0, 0]])
    expected, total = 0.0, 0.0
    for row in range(2):
        for place in range(1, 5):
            weight = weights[row, place].item()
            probabilities = torch.softmax(logits[row, place - 1].double(), -1)
            expected -= weight * torch.log(probabilities[ids[row, place]]).item()
            total += weight
    assert weighted_loss(logits, ids, weights).item() == pytest.approx(expected / total, rel=1e-5)


def test_rows_longer_than_the_model_reads_are_refused(small):
    small.set_params({"base_model.max_length": 600})
    refused = small.run("base-model", raw="raw", sources_lock="params.yaml", out="longer", out_curve="longer.csv")
    small.set_params({})
    assert_one_sentence(refused, "base_model.max_length: 600 is more than architecture.positions, 512")

"""The kernel of stages/inference/decode_attention.py against plain softmax attention, on a CUDA GPU."""

import pytest
import torch

pytestmark = pytest.mark.gpu
HEADS, SIZE, PAGE = 5, 64, 16
LENGTHS = [1, 2, 16, 17, 33, 70, 300, 40]  # with the new tokens
NEW = [1, 1, 1, 1, 1, 1, 1, 3]  # the last row is a prompt's


@pytest.fixture(scope="module", params=["tokens before heads", "heads before tokens"])
def step(request) -> dict[str, torch.Tensor]:
    """A step's tensors, rows' pages in any order, queries, keys and values side by side as a model computes them."""
    draw = torch.Generator("cuda").manual_seed(0)
    pages = [-(-length // PAGE) for length in LENGTHS]
    numbers = iter(torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).tolist())
    table = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
    for row, many in enumerate(pages):
        table[row, :many] = torch.tensor([next(numbers) for _ in range(many)])
    starts = torch.tensor([0, *NEW], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    slots = [table[row, at // PAGE].item() * PAGE + at % PAGE
             for row, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)) for at in range(length - new, length)]  # fmt: skip
    side_by_side = torch.randn(sum(NEW), 3 * HEADS * SIZE, generator=draw, device="cuda").bfloat16()
    query, key, value = (part.view(-1, HEADS, SIZE) for part in side_by_side.split(HEADS * SIZE, dim=1))
    tokens_first = request.param.startswith("tokens")
    order = (PAGE, HEADS) if tokens_first else (HEADS, PAGE)
    held = torch.randn(sum(pages), *order, 2 * SIZE, generator=draw, device="cuda").bfloat16()
    made = {"query": query, "key": key, "value": value, "cache": held.transpose(1, 2) if tokens_first else held}
    made |= {"table": table, "lengths": torch.tensor(LENGTHS, dtype=torch.int32), "starts": starts, "slots": torch.tensor(slots)}
    return {name: tensor.cuda() for name, tensor in made.items()}


def attended(step: dict[str, torch.Tensor], rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out for some rows of the step, and the cache after it; 7 where nothing was written."""
    from stages.inference.decode_attention import attend

    out, cache = torch.full_like(step["query"], 7.0), step["cache"].clone(memory_format=torch.preserve_format)
    starts = step["starts"][rows.start : rows.stop and rows.stop + 1]
    few = {"table": step["table"][rows], "lengths": step["lengths"][rows], "starts": starts}
    attend(**{**step, **few, "cache": cache}, out=out, scale=SIZE**-0.5)
    return out, cache


def test_a_row_of_one_new_token_gets_softmax_attention_over_all_it_has_and_the_cache_its_key_and_value(step):
    out, cache = attended(step)
    expected = step["cache"].clone(memory_format=torch.preserve_format)
    for row, (length, new) in enumerate(zip(LENGTHS, NEW, strict=True)):
        token = step["starts"][row].item()
        if new > 1:
            assert (out[token : token + new] == 7.0).all()
            continue
        page, place = divmod(step["slots"][token].item(), PAGE)
        expected[page, :, place] = torch.cat([step["key"][token], step["value"][token]], dim=-1)
        at = torch.arange(length, device="cuda")
        keys, values = expected[step["table"][row][at // PAGE].long(), :, at % PAGE].float().split(SIZE, dim=-1)  # (length, heads, size)
        weights = torch.einsum("hd,lhd->hl", step["query"][token].float(), keys).mul(SIZE**-0.5).softmax(-1)
        torch.testing.assert_close(out[token].float(), torch.einsum("hl,lhd->hd", weights, values), rtol=2**-8, atol=2**-8)
    assert torch.equal(cache, expected)


def test_a_row_is_summed_up_alike_alone_and_among_others_and_again(step):
    out, _ = attended(step)
    for row in range(len(LENGTHS) - 1):
        token = step["starts"][row].item()
        assert torch.equal(attended(step, slice(row, row + 1))[0][token], out[token])
    assert torch.equal(attended(step)[0], out)


def test_a_row_that_only_fills_a_batch_up_writes_nothing(step):
    nowhere = {**step, "starts": torch.zeros_like(step["starts"]), "slots": torch.full_like(step["slots"], -1)}
    out, cache = attended(nowhere)
    assert (out == 7.0).all()
    assert torch.equal(cache, step["cache"])

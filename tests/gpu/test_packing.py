"""Packed rows on a CUDA GPU: torch's variable-length attention, compiled layers, and the bits that come again."""

import pytest

from tests.gpu.conftest import UPDATES, killed_and_resumed
from tests.gpu.test_training import PACKED, TOLERANCE, adapter, column, falls

pytestmark = pytest.mark.gpu
WAYS = {
    "compiled": PACKED,
    "again": PACKED,
    "plain": {**PACKED, "compile": False},
    "recomputed": {**PACKED, "recompute": True, "rows": 4},
    "four-bits": {**PACKED, "dequantise": False},
    "recomputed-in-four-bits": {**PACKED, "recompute": True, "rows": 8, "dequantise": False},
    "attention-too": {**PACKED, "recompute": True, "rows": 8, "dequantise": False, "memory_gib": 0.5},  # recomputed, where there is room for nothing
}


@pytest.mark.parametrize("method", ["sft", "qlora"])
def test_packed_rows_lose_as_padded_ones_and_give_the_same_bytes_again(train, method):
    padded, compiled, again, *others = train(method, {"beside-packed": {}} | {name: {"packed": packed} for name, packed in WAYS.items()})
    assert adapter(again) == adapter(compiled)
    assert (again / "curve.csv").read_bytes() == (compiled / "curve.csv").read_bytes()
    expected = column(padded, "loss")
    for folder in (compiled, *others):
        losses = column(folder, "loss")
        assert len(losses) == UPDATES and falls(losses)
        assert losses == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), folder


def test_a_killed_packed_run_goes_on_to_the_same_bytes(place, train):
    (whole,) = train("qlora", {"packed-undisturbed": {"packed": PACKED}})
    run = killed_and_resumed(place, "qlora", 10, "packed-killed", {"qlora.packed": PACKED})
    assert adapter(run.folder) == adapter(whole)


def test_packed_grpo_comes_again_and_earns_what_padded_grpo_earns(train):
    padded, packed, again = train("grpo", {"beside-packed": {}, "packed": {"packed": PACKED}, "packed-again": {"packed": PACKED}})
    assert adapter(again) == adapter(packed)
    assert (again / "curve.csv").read_bytes() == (packed / "curve.csv").read_bytes()
    assert column(packed, "reward")[0] == column(padded, "reward")[0]  # drawn before the first update
    for name in ("grad_norm", "entropy"):
        assert column(packed, name)[0] == pytest.approx(column(padded, name)[0], rel=0.1), name


def test_packed_gradients_are_as_near_the_exact_ones_as_padded(place):
    """Against 32 bits, one batch of 8 rows: what packing changes is less than what 16 bits do."""
    import torch

    from stages.harness.jsonl import read_json
    from stages.harness.params import read_params, section
    from stages.sft import Params
    from stages.training.models import Transformers
    from stages.training.packing import IGNORED, Packed, PackedRows, answer_loss, pack

    p = section(place / "params.yaml", read_params(place / "params.yaml"), "sft", Params).model_copy(update={"packed": Packed(**PACKED)})
    draw = torch.Generator().manual_seed(0)
    known = read_json(place / "base/config.json")["vocab_size"]
    rows = [{"input_ids": torch.randint(5, known, (length,), generator=draw).tolist()} for length in (31, 90, 256, 7, 120, 64, 200, 33)]

    def gradients(precision: str, packed: bool):
        backend = Transformers(precision)
        base = backend.load_base(place / "base")
        if packed:
            base = PackedRows(p, place / "base", place / "packing-scratch", rank=p.lora.rank, longest=p.max_length, nf4=False).prepare(base)
        torch.manual_seed(0)
        model = backend.new_adapter(base, p.lora)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data = torch.randn(weight.shape).to("cuda") * 0.02
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            decoder, head = model.get_base_model().model, model.get_base_model().lm_head.weight
            if packed:
                batch = {name: value.cuda() if hasattr(value, "cuda") else value for name, value in pack(rows, longest=256).items()}
                labels, places = batch.pop("labels"), batch.pop("places")
                loss, *_ = answer_loss(decoder(**batch, use_cache=False).last_hidden_state, head, labels, places, compiled=True)
                loss = loss / len(places)
            else:
                ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True).cuda()
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True).cuda()
                labels = ids.masked_fill(mask == 0, IGNORED)
                hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                logits = (hidden[:, :-1] @ head.to(hidden.dtype).t()).float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.requires_grad])

    exact, padded, packed = gradients("fp32", False), gradients("bf16", False), gradients("bf16", True)
    error_padded, error_packed = ((each - exact).norm() / exact.norm() for each in (padded, packed))
    print(f"relative error of the gradient in bf16: padded {error_padded:.5f}, packed and compiled {error_packed:.5f}")
    assert error_packed < 1.2 * error_padded

"""Rows without padding: the same update as padded ones, and no row sees another."""

import csv

import pytest

from stages.corpus.marks import TURN_END
from stages.harness.jsonl import read_json
from stages.harness.params import read_params, section
from stages.sft import Params
from stages.training.packing import ATTENTION, Packed, PackedRows, Padded, pack
from stages.training.trainer import dataset
from tests.pipeline.conftest import assert_one_sentence

WRITTEN = {"rows": 8, "recompute": False, "dequantise": False, "compile": False, "memory_gib": None}
PLANNED = {**WRITTEN, "rows": None, "recompute": None}
LITTLE_ROOM = {**PLANNED, "memory_gib": 1.318}  # two pairs, and one layer keeps its work

ROWS = {"rank": 16, "longest": 256, "nf4": False}


@pytest.fixture(scope="module")
def gradients(small, tmp_path_factory):
    """The adapter's gradients of one batch of rows, by trl's own trainer, padded or packed."""
    from transformers import set_seed
    from trl import SFTConfig

    from stages.training.models import Transformers, load_tokenizer
    from stages.training.supervised import supervised_trainer

    p = section(small / "params.yaml", read_params(small / "params.yaml"), "sft", Params)
    tokenizer = load_tokenizer(small / "base", small / "mix/sft/chat_template.jinja", ends_with=TURN_END)

    def of(packed, rows):
        set_seed(0)
        scratch = tmp_path_factory.mktemp("packing")
        layout = PackedRows(p.model_copy(update={"packed": Packed(**packed)}), small / "base", scratch, **ROWS) if packed else Padded(p)
        model = Transformers("fp32").new_adapter(layout.prepare(Transformers("fp32").load_base(small / "base")), p.lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.02)  # untrained it is nought, and the other half has no gradient
        config = SFTConfig(output_dir=str(scratch), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none", max_length=256,
                           loss_type="nll", **{"gradient_checkpointing": False, **layout.arguments, "per_device_train_batch_size": rows})  # fmt: skip
        trainer = supervised_trainer(layout)(model=model, args=config, processing_class=tokenizer, data_collator=layout.collator,
                             train_dataset=dataset(small / "mix/sft/train.jsonl", ("messages",)))  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(batch["labels"][..., 1:] != -100).sum())
        loss.backward()
        told = {}
        trainer.log(told)
        return loss.item(), told, {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    return of


@pytest.mark.parametrize("change", [{}, {"recompute": True}])
def test_a_packed_batch_has_the_padded_ones_loss_gradients_and_figures(gradients, change):
    padded_loss, padded_told, padded = gradients(None, 8)
    loss, told, packed = gradients({**WRITTEN, **change}, 8)
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert told[name] == pytest.approx(padded_told[name], rel=1e-4), name
    assert packed.keys() == padded.keys() and len(packed) > 20
    for name, gradient in packed.items():
        assert (gradient - padded[name]).norm() < 1e-5 * padded[name].norm(), name


def test_no_row_sees_another(small, tmp_path):
    import torch

    from stages.training.models import Transformers

    packed = section(small / "params.yaml", read_params(small / "params.yaml"), "sft", Params).model_copy(update={"packed": Packed(**WRITTEN)})
    model = PackedRows(packed, small / "base", tmp_path, **ROWS).prepare(Transformers("fp32").load_base(small / "base")).eval()
    draw = torch.Generator().manual_seed(0)
    first, second, third = (torch.randint(5, 200, (length,), generator=draw).tolist() for length in (17, 40, 3))

    def logits(*rows):
        batch = pack([{"input_ids": row} for row in rows], longest=64)
        del batch["labels"], batch["places"]
        with torch.inference_mode():
            return model(**batch).logits[0]

    together = logits(first, second, third)
    assert torch.allclose(together[17:57], logits(second), atol=1e-5)
    assert torch.allclose(logits(third, second)[3:], logits(second), atol=1e-5)
    assert model.config._attn_implementation == ATTENTION


def test_a_packed_run_goes_as_a_padded_one_and_comes_again(small):
    curves = []
    for name, changes in (("padded", {}), ("packed", {"sft.packed": WRITTEN}), ("again", {"sft.packed": WRITTEN})):
        small.set_params({"sft.max_steps": 50, **changes})
        small.do("sft", base="base", mix="mix", out=f"{name}-adapter", out_curve=f"{name}.csv")
        with (small / f"{name}.csv").open() as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
    small.set_params({})
    padded, packed, again = curves
    assert len(packed) == 50 and packed == pytest.approx(padded, rel=2e-3)
    assert again == packed
    weights = [(small / f"{name}-adapter/adapter_model.safetensors").read_bytes() for name in ("packed", "again")]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def rollouts(small, tmp_path_factory):
    """grpo's trainer on the small sft adapter, with or without packing, and completions in padded rows."""
    import torch
    from trl import GRPOConfig

    from stages.training.models import Transformers, load_tokenizer
    from stages.training.rollouts import rollout_trainer

    p = section(small / "params.yaml", read_params(small / "params.yaml"), "sft", Params).model_copy(update={"packed": Packed(**WRITTEN)})
    tokenizer = load_tokenizer(small / "base", small / "mix/grpo/chat_template.jinja", ends_with=TURN_END)
    made = []
    for packed in (False, True):
        scratch = tmp_path_factory.mktemp("rollouts")
        packing = PackedRows(p, small / "base", scratch, **ROWS) if packed else None
        base = Transformers("fp32").load_base(small / "base")
        model = Transformers("fp32").held_adapter(packing.prepare(base) if packing else base, small / "sft")
        config = GRPOConfig(output_dir=str(scratch), use_cpu=True, bf16=False, report_to="none", temperature=0.9, beta=0.0, num_generations=4,
                            per_device_train_batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False)  # fmt: skip
        made.append(rollout_trainer()(model=model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=config,
                                      train_dataset=dataset(small / "mix/grpo/train.jsonl", ("prompt", "answer")), processing_class=tokenizer))  # fmt: skip
        made[-1].packing = packing
        made[-1].model.train()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (8, 60), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : row * 3] = 0  # prompts are padded on the left
        mask[row, 60 - row * 4 :] = 0  # completions on the right
    return made, ids, mask, 35


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 4, 4, 4, 4], [0, 1, 0, 1, 1, 5, 0, 5]])
def test_completions_without_padding_have_trls_log_probabilities_entropies_and_gradients(rollouts, groups, monkeypatch):
    """Also where those of a group have one prompt, which is computed once, and room is made for once."""
    (padded, packed), ids, mask, kept = rollouts
    ids, mask = ids.clone(), mask.clone()
    ids[:, :-kept], mask[:, :-kept] = ids[groups, :-kept], mask[groups, :-kept]
    computed, planned = [], []
    monkeypatch.setattr(packed.packing, "by_batch", True)
    monkeypatch.setattr(packed.packing, "layers_kept", lambda tokens: planned.append(tokens) or 2)
    packed.model.get_base_model().get_decoder().embed_tokens.register_forward_hook(lambda _, __, out: computed.append(out.shape[1]))
    found = []
    for trainer in (padded, packed):
        logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, compute_entropy=True)
        there = mask[:, -kept:].bool()
        (logprobs * there * ids[:, -kept:].cos()).sum().backward()  # any weights that differ by token
        found.append((logprobs[there], entropies[there], _gradient(trainer)))
        assert logprobs.shape == (8, kept)
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    prompts = mask[:, :-kept].sum(1).tolist()
    assert [computed[-1]] == planned == [mask.sum() - sum(prompts[row] for row, first in enumerate(groups) if first != row)]


def test_a_layer_is_one_graph_also_where_rows_begin_alike(small, tmp_path, monkeypatch):
    """As a GPU's attention leaves it, for which another kernel stands here: by rows, as on a CPU, it cuts a graph wherever a row ends."""
    import torch
    import torch.nn.attention.varlen

    from stages.training import packing
    from stages.training.logprobs import packed_logprobs
    from stages.training.models import Transformers

    monkeypatch.setattr(packing, "_has_flash", lambda query: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, *_, **others: query + key.sum(0) + value.sum(0))
    p = section(small / "params.yaml", read_params(small / "params.yaml"), "sft", Params).model_copy(update={"packed": Packed(**WRITTEN)})
    model = PackedRows(p, small / "base", tmp_path, **ROWS).prepare(Transformers("fp32").load_base(small / "base"))
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, fullgraph=True, backend="eager")
    ids = torch.randint(5, 200, (3, 40), generator=torch.Generator().manual_seed(0))
    there, wanted = torch.ones_like(ids), torch.arange(40).expand(3, 40) > 0
    for alike in (0, 12):
        lent = torch.tensor([0, alike, alike])
        found, _ = packed_logprobs(model.get_decoder(), model.get_output_embeddings().weight, ids, there, wanted, torch.zeros_like(lent), lent,
                                   temperature=1.0, longest=256, compiled=False)  # fmt: skip
        found.sum().backward()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_the_samplers_correction_computed_is_what_the_loss_gets_of_shuffled_rows(rollouts, monkeypatch, kept):
    """Also where only the last layers keep what they computed, and the others compute it anew, for the gradient alone."""
    import torch
    from trl.models.utils import disable_gradient_checkpointing

    (_, packed), ids, mask, answers = rollouts
    fresh, entropies, _ = packed._get_per_token_logps_and_entropies(packed.model, ids, mask, answers)
    (fresh * ids[:, -answers:].cos()).sum().backward()
    expected = _gradient(packed)
    monkeypatch.setattr(packed.packing, "by_batch", True)
    monkeypatch.setattr(packed.packing, "layers_kept", lambda tokens: kept)
    computed = []
    for place, layer in enumerate(packed.model.get_base_model().get_decoder().layers):
        layer.self_attn.register_forward_hook(lambda *_, place=place: computed.append(place))
    with torch.no_grad(), disable_gradient_checkpointing(packed.model):  # as trl asks
        before, _, _ = packed._get_per_token_logps_and_entropies(packed.model, ids, mask, answers)
    assert not before.requires_grad and torch.equal(before, fresh) and packed.known is not None
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    again, their_entropies, _ = packed._get_per_token_logps_and_entropies(packed.model, ids[order], mask[order], answers)
    assert packed.known is None and computed == [0, 1]
    assert torch.equal(again, fresh[order]) and torch.equal(their_entropies, entropies[order])
    (again * ids[order][:, -answers:].cos()).sum().backward()
    assert computed == [0, 1, *{0: (1, 0), 1: (0,), 2: ()}[kept]]
    gradient = _gradient(packed)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


def _gradient(trainer):
    import torch

    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    for weight in weights:
        weight.grad = None
    return gradient


def test_packed_grpo_goes_as_padded_grpo(small):
    rows = []
    for name, packed in (("padded-grpo", None), ("packed-grpo", PLANNED)):
        small.set_params({"grpo.packed": packed})
        small.do("grpo", base="base", adapter="sft", mix="mix", out=name, out_curve=f"{name}.csv")
        with (small / f"{name}.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    small.set_params({})
    padded, packed = rows
    assert len(packed) == len(padded) == 4
    for name in ("loss", "grad_norm", "entropy"):
        values = [[float(row[name]) for row in each] for each in (packed, padded)]
        assert values[0][0] == pytest.approx(values[1][0], rel=1e-3, abs=1e-5), name
    assert packed[0]["reward"] == padded[0]["reward"]


def test_packed_orpo_is_padded_orpo_whatever_is_computed_at_once(small):
    """Its likelihood term is a mean over the tokens of each micro-batch; computing four of them at once changes no mean."""
    curves = []
    for name, changes in (("padded", {"orpo.per_device_batch": 2, "orpo.accumulation": 4}),
                          ("packed", {"orpo.per_device_batch": 2, "orpo.accumulation": 4, "orpo.packed": WRITTEN}),
                          ("again", {"orpo.per_device_batch": 2, "orpo.accumulation": 4, "orpo.packed": {**WRITTEN, "rows": 4, "recompute": True}}),
                          ("by-room", {"orpo.per_device_batch": 2, "orpo.accumulation": 4, "orpo.packed": LITTLE_ROOM})):  # fmt: skip
        small.set_params(changes)
        small.do("orpo", base="base", pairs="pairs", out=f"{name}-orpo", out_curve=f"{name}-orpo.csv")
        with (small / f"{name}-orpo.csv").open() as file:
            curves.append(list(csv.DictReader(file)))
    small.set_params({})
    record = read_json(small / f"scratch-{small.runs}/stage.json")
    assert (record["rows"], record["recompute"]) == (2, True)
    for packed in curves[1:]:
        assert len(packed) == len(curves[0]) == 8
        for name in ("loss", "grad_norm", "nll_loss", "log_odds_chosen", "rewards.margins", "logps.chosen"):
            # the seventh update ends the epoch with 6 pairs of 8; what is logged beside its loss is a plain mean of its micro-batches
            steps = slice(None) if name in ("loss", "grad_norm") else slice(6)
            values = [[float(row[name]) for row in each[steps]] for each in (packed, curves[0])]
            assert values[0] == pytest.approx(values[1], rel=2e-3, abs=1e-5), name


def test_rows_that_do_not_divide_the_batch_are_refused(small):
    small.set_params({"sft.packed": {**WRITTEN, "rows": 3}})
    refused = small.run("sft", base="base", mix="mix", out="refused", out_curve="refused.csv")
    small.set_params({})
    assert_one_sentence(refused, "packed.rows: 3 does not divide the batch")

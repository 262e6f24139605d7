"""The memory plan: what fits where, in the order of speed."""

import json
from dataclasses import replace

import pytest

from stages.harness.errors import InputError
from stages.harness.params import read_params
from stages.training.memory import GIB, USABLE, Needs, Plan, Shape, choose
from stages.training.rollouts_apart import planned_gpus
from tests.imports import ROOT

QWEN = {
    "num_hidden_layers": 40, "hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 20,
    "intermediate_size": 6912, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip
FREE = {"rows": None, "recompute": None, "dequantise": None}


@pytest.fixture
def needs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return Needs(Shape.read(tmp_path), rank=32, nf4=True, width=2, longest=2048, chunk=1024)


def test_the_shape_counts_qwens_weights(needs):
    assert needs.shape.linear + needs.shape.embedding == pytest.approx(3.95e9, rel=0.01)  # its card says 3.95 billion
    assert needs.shape.adapter * 32 == 62_586_880  # as peft counts those of rank 32


@pytest.mark.parametrize(
    ("gib", "plan"),
    [
        (139, Plan(8, recompute=False, dequantise=True)),
        (79, Plan(8, recompute=False, dequantise=True)),
        (48, Plan(4, recompute=False, dequantise=True)),
        (40, Plan(4, recompute=False, dequantise=False)),
        (15, Plan(8, recompute=True, dequantise=False)),
    ],
)
def test_the_fastest_plan_that_fits_is_taken(needs, gib, plan):
    assert choose(needs, 8, gib, **FREE) == plan


@pytest.mark.parametrize(("gib", "layers"), [(16, 40), (14, 24), (13, 13)])
def test_attention_is_kept_in_as_many_of_the_recomputed_layers_as_there_is_room_for(needs, gib, layers):
    plan = choose(needs, 8, gib, **FREE, attention=True)
    assert plan == Plan(8, recompute=True, dequantise=False, attention=layers)
    room = USABLE * gib * GIB
    assert needs.bytes(plan) <= room and (layers == 40 or needs.bytes(replace(plan, attention=layers + 1)) > room)
    assert choose(needs, 8, gib, **FREE) == replace(plan, attention=0)


def test_attention_takes_no_room_where_nothing_is_recomputed(needs):
    assert choose(needs, 8, 139, **FREE, attention=True).attention == 0


@pytest.mark.parametrize(("rows", "layers"), [(4, 40), (12, 40), (16, 31), (32, 14), (64, 6), (200, 0)])
def test_the_last_layers_keep_what_they_computed_as_far_as_there_is_room(needs, rows, layers):
    """Beside an engine, as in grpo: a batch of few tokens keeps all, a larger one what fits."""
    needs, room = replace(needs, nf4=False, rank=16, beside=24 * GIB), USABLE * 139 * GIB
    assert needs.layers_kept(rows * needs.longest, 139, dequantise=False) == layers
    assert (layers == 40) == (needs.bytes(Plan(rows, recompute=False, dequantise=False)) <= room)


def test_what_is_given_is_kept(needs):
    assert choose(needs, 8, 139, **{**FREE, "rows": 2, "dequantise": False}) == Plan(2, recompute=False, dequantise=False)
    assert choose(needs, 8, 1, rows=8, recompute=False, dequantise=False) == Plan(8, recompute=False, dequantise=False)


def test_a_base_in_16_bits_has_nothing_to_dequantise(needs):
    assert not choose(replace(needs, nf4=False), 8, 139, **FREE).dequantise


def test_where_nothing_fits_the_least_is_named(needs):
    with pytest.raises(InputError, match=r"1 rows of 2048 tokens take about \d"):
        choose(needs, 8, 3, **FREE)


@pytest.mark.parametrize(("gpus", "gib", "profile", "apart"), [
    (2, 139, "report-h200", 0), (2, 24, "report-h200", 1), (4, 24, "report-h200", 2), (3, 24, "report-h200", 1), (1, 24, "report-h200", 0),
    (2, 15, "report-t4", 1), (2, 24, "report-t4", 0), (4, 1, "embedded", 0),
])  # fmt: skip
def test_engines_get_gpus_alone_where_none_fits_beside_a_trainer_and_leave_as_many_as_divide_the_batch(needs, tmp_path, gpus, gib, profile, apart):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16}))
    section = read_params(ROOT / f"params/{profile}.yaml")["grpo"]
    assert planned_gpus(section, tmp_path, tmp_path, gpus, gib) == apart
    assert planned_gpus({**section, "rollouts": None}, tmp_path, tmp_path, gpus, gib) == 0  # the stage says what is wrong


LLAMA_70B = {
    "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28_672, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(("shares", "gib"), [(1, 51.6), (2, 34.4), (8, 20.9)])
def test_a_base_that_is_shared_out_takes_its_part_of_a_gpu_and_what_is_gathered(tmp_path, shares, gib):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    needs = Needs(Shape.read(tmp_path), rank=32, nf4=True, width=2, longest=2048, chunk=1024, shares=shares)
    assert needs.bytes(Plan(1, recompute=True, dequantise=False)) / 2**30 == pytest.approx(gib, rel=0.01)


def test_a_base_is_shared_out_where_the_whole_of_it_leaves_no_room_for_a_row(tmp_path, needs):
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(json.dumps(LLAMA_70B))
    large = replace(needs, shape=Shape.read(tmp_path / "large"))
    assert needs.fits(15) and large.fits(79) and not large.fits(47)

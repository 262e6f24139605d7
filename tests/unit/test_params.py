"""Parameters: every profile is complete, and what is wrong is said by name."""

import importlib
import re
from pathlib import Path

import pytest

from stages.harness.errors import InputError
from stages.harness.params import SECTIONS, STAGES, Images, Run, StageParams, read_params, section, section_of
from stages.host.tracking import Tracking

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILES = sorted(path for path in (ROOT / "params").glob("*.yaml") if not path.stem.endswith(".lock"))
MODELS = {"run": Run, "images": Images, "tracking": Tracking} | {
    section_of(stage): importlib.import_module(f"stages.{section_of(stage)}").Params for stage in STAGES
}


def keys(value, path=""):
    """Every key of nested mappings, as dotted paths. Shares by a number of steps are one value: any may be left out; so is `packed`."""
    if not isinstance(value, dict) or all(isinstance(name, int) for name in value) or path.endswith(".packed"):
        return {path}
    return set().union(*(keys(inner, f"{path}.{name}") for name, inner in value.items()))


def test_there_are_five_profiles_and_each_says_its_name():
    assert [path.stem for path in PROFILES] == ["embedded", "gsm8k-local", "report-h200", "report-t4", "scratch-gpu"]
    assert all(read_params(path)["profile"] == path.stem for path in PROFILES)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_has_the_sections_in_order_and_valid_types(path):
    values = read_params(path)
    assert tuple(values) == SECTIONS
    for name, model in MODELS.items():
        section(path, values, name, model)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_has_the_same_keys_as_every_other(path):
    assert keys(read_params(path)) == keys(read_params(PROFILES[0]))


class Example(StageParams):
    seed: int
    lr: float
    steps: int
    name: str | None


def parse(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return section(path, read_params(path), "orpo", Example)


GOOD = "seed: 7\norpo: {lr: 0.1, steps: 3, name: null}\n"


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1e-05", "1.0e-5", "0.00001", ".1e-4", "+1e-5"])
def test_a_small_number_is_a_number_in_any_spelling(tmp_path, written):
    assert parse(tmp_path, GOOD.replace("0.1", written)).lr == 1e-5


def test_the_seed_joins_a_section_that_asks_for_it(tmp_path):
    assert parse(tmp_path, GOOD).seed == 7
    assert parse(tmp_path, GOOD.replace("orpo: {", "orpo: {seed: null, ")).seed == 7
    assert parse(tmp_path, GOOD.replace("orpo: {", "orpo: {seed: 3, ")).seed == 3


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (GOOD.replace("lr:", "rl:"), "orpo.lr is missing"),
        (GOOD.replace("steps: 3", "steps: 3, stesp: 4"), "unknown parameter orpo.stesp"),
        (GOOD.replace("0.1", "'1e-5'"), "orpo.lr is '1e-5'"),
        (GOOD.replace("steps: 3", "steps: 3.5"), "orpo.steps is 3.5"),
        (GOOD.replace("steps: 3", "steps: true"), "orpo.steps is True"),
        (GOOD.replace("name: null", "name: 3"), "orpo.name is 3"),
        (GOOD.replace("orpo", "opro"), "unknown section 'opro'"),
        ("seed: 7\n", "section orpo is missing"),
        ("seed: 7\norpo: 3\n", "orpo must be a mapping, found 3"),
        ("seed: 7\norpo: {lr: 0.1\n", "line 3"),
        ("- a\n", "expected a mapping"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_with_file_and_key(tmp_path, text, names):
    with pytest.raises(InputError, match=re.escape(names)) as error:
        parse(tmp_path, text)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_params_file_says_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match="cp params/embedded.yaml"):
        read_params(tmp_path / "params.yaml")

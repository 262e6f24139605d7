"""What may be given on, by the terms of what a model is made of."""

import pytest

from stages.harness.errors import InputError
from stages.harness.params import read_params
from stages.host.licences import forbidden, ingredients, licence_of
from tests.imports import ROOT

MADE_HERE = {"kind": "generator"}
QWEN = {"kind": "hub", "repo": "Qwen/Qwen1.5-4B", "revision": 40 * "b", "license": "other", "license_name": "tongyi-qianwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen1.5-4B/blob/main/LICENSE", "gated": False}  # fmt: skip


def hub(license, **more):
    return {"kind": "hub", "repo": "team/maths", "revision": 40 * "a", "license": license, "gated": False, **more}


def why(read=(), **made_of):
    return " ".join(forbidden({name.replace("_", "-"): source for name, source in made_of.items()}, read))


@pytest.mark.parametrize("license", ["mit", "apache-2.0", "cc-by-4.0", "cc0-1.0", "mit, apache-2.0", "cc-by-sa-4.0", "cc-by-nc-4.0"])
def test_known_terms_that_allow_it_need_nobody(license):
    assert why(reasoning=hub(license), chat=MADE_HERE) == ""


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (hub(None), "terms that are not known here, not known"),
        (hub("other", license_name="house-rules"), "not known here, house-rules"),
        (hub("llama3.1"), "not known here, llama3.1"),
        (hub("mit, other"), "not known here, mit, other"),
        (hub("mit", gated="manual"), "is gated, and its terms are not known here"),
        ({"kind": "local"}, "the terms of reasoning (a local file) are not known here"),
        ({"kind": "teacher", "model": "large"}, "the terms of reasoning (answers of large) are not known here"),
    ],
)
def test_terms_that_are_not_known_are_for_somebody_to_read(source, sentence):
    assert sentence in why(reasoning=source) and "say so with --terms-read reasoning" in why(reasoning=source)
    assert why(reasoning=source, read=("reasoning",)) == ""


def test_the_terms_of_a_base_from_a_local_folder_are_for_somebody_to_read():
    params = read_params(ROOT / "params/embedded.yaml")
    params["base_model"] |= {"kind": "local", "folder": "my-llama"}
    made_of = ingredients("qlora", params, {"reasoning": MADE_HERE}, None)
    assert "the terms of base-model (a local file) are not known here" in " ".join(forbidden(made_of, ()))
    assert forbidden(made_of, ("base-model",)) == []


def test_a_licence_that_forbids_derivatives_is_no_matter_of_reading():
    assert "cc-by-nd-4.0, which forbids" in why(reasoning=hub("cc-by-nd-4.0"), read=("reasoning",))


def test_two_licences_that_each_want_to_be_the_models_are_refused():
    assert "each ask that what is made of them" in why(reasoning=hub("cc-by-sa-4.0"), chat=hub("cc-by-nc-4.0"))
    assert why(reasoning=hub("cc-by-sa-4.0"), chat=hub("cc-by-sa-4.0")) == ""


def test_a_name_of_nothing_that_the_model_is_made_of_is_refused():
    with pytest.raises(InputError, match="--terms-read chat: the model is not made of that: name some of reasoning"):
        forbidden({"reasoning": MADE_HERE}, ("chat",))


@pytest.mark.parametrize(
    ("made_of", "own", "license"),
    [
        ({"reasoning": MADE_HERE}, None, {}),
        ({"reasoning": MADE_HERE}, "mit", {"license": "mit"}),
        ({"base-model": hub("apache-2.0"), "reasoning": hub("cc-by-4.0")}, None, {"license": "apache-2.0"}),
        ({"base-model": hub("apache-2.0"), "reasoning": hub("cc-by-sa-4.0")}, None, {"license": "cc-by-sa-4.0"}),
        ({"base-model": QWEN}, None, {name: QWEN[name] for name in ("license", "license_name", "license_link")}),
    ],
)
def test_a_model_carries_what_its_ingredients_ask_for_and_else_what_its_makers_choose(made_of, own, license):
    assert licence_of(made_of, own) == license


def test_its_makers_may_not_choose_another():
    with pytest.raises(InputError, match="--license mit: what the model is made of asks for tongyi-qianwen-research"):
        licence_of({"base-model": QWEN}, "mit")


@pytest.mark.parametrize(
    ("profile", "model", "names"),
    [
        ("embedded", "base", ["pretraining"]),
        ("embedded", "qlora", ["pretraining", "reasoning", "chat", "validation"]),
        ("embedded", "grpo", ["pretraining", "reasoning", "rl", "validation"]),
        ("embedded", "orpo", ["pretraining", "reasoning"]),
        ("report-t4", "qlora", ["base-model", "reasoning", "chat"]),
        ("report-t4", "base", ["base-model"]),
        ("report-t4", "orpo", ["base-model", "preferences"]),
    ],
)
def test_a_model_is_made_of_its_base_and_what_its_methods_read_and_never_of_the_test(profile, model, names):
    params = read_params(ROOT / f"params/{profile}.yaml")
    sources = {name: source for name, source in params["fetch"]["sources"].items() if source["kind"] != "none"}
    assert list(ingredients(model, params, sources, QWEN if params["base_model"]["kind"] == "hub" else None)) == names


def test_a_teachers_answers_are_an_ingredient_where_pairs_take_them():
    params = read_params(ROOT / "params/embedded.yaml")
    params["preference_pairs"] |= {"accepted": "teacher", "teacher": {"model": "large"}}
    assert ingredients("orpo", params, {}, None) == {"teacher": {"kind": "teacher", "model": "large"}}
    assert "teacher" not in ingredients("qlora", params, {}, None)

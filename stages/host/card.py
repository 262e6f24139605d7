"""The card of a published model: what was measured, what it was made of, how it is run and how it is made again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.corpus.chat_format import render
from stages.host.layout import Chosen, Part
from stages.host.licences import BASE, in_words, licence_of
from stages.host.measured import Measured
from stages.host.results import Row, stage_of
from stages.host.tables import ORIGINS
from stages.host.wording import hundred, number, p_value, percent, points, seconds

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def card(run: Measured, to: str, chosen: Chosen, files: list[Part], license: str | None, read: tuple[str, ...]) -> str:
    """The card as README.md holds it; what the hub reads stands in YAML before the text."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals.update(number=number, percent=percent, hundred=hundred, points=points, p_value=p_value, seconds=seconds)
    text = environment.get_template(TEMPLATE.name).render(
        r=run, to=to, name=to.rpartition("/")[2], chosen=chosen, files=files, model=run.model,
        title=_title(run.model), base=_base(run), how=run.graph[stage_of(run.model)].desc,
        prompt=(prompt := render(run.asking.template, "QUESTION")), prompt_literal=json.dumps(prompt),
        scores=_scores(run), pairs=_pairs(run), forms=run.comparison["models"].get(f"{run.model}-gguf", {}).get("forms", {}),
        parameters=_parameters(run), data=_data(run), runs=list(_runs(run)), read=read,
        license=licence_of(run.ingredients, license), in_words=in_words,
        n=run.metrics["models"][run.model]["n"], tokens=run.params["eval"]["max_new_tokens"],
        asked=run.asking, preferred=chosen.gguf and run.asking.preferred(chosen.gguf).upper(),
        generated=run.sources.get("test", {}).get("kind") == "generator",
    )  # fmt: skip
    return ModelCard(f"---\n{metadata(run, to, chosen, license).to_yaml()}\n---\n\n{text}").content


def metadata(run: Measured, to: str, chosen: Chosen, license: str | None):
    """A ModelCardData: what the hub's search, pages and leaderboards read."""
    from huggingface_hub import ModelCardData

    relation = "finetune" if chosen.weights else "adapter" if chosen.adapter else "quantized"
    return ModelCardData(
        **({"base_model": run.base_source["repo"], "base_model_relation": relation} if run.base_source else {}),
        datasets=sorted({source["repo"] for name, source in run.ingredients.items() if source["kind"] == "hub" and name != BASE}) or None,
        eval_results=list(_eval_results(run)),
        language="en",
        library_name="transformers" if chosen.weights else "peft" if chosen.adapter else None,
        model_name=to.rpartition("/")[2],
        pipeline_tag="text-generation",
        tags=["mathmind", run.model, "math", *(["lora"] if chosen.adapter else []), *(["gguf"] if chosen.gguf else [])],
        **licence_of(run.ingredients, license),
    )


def _eval_results(run: Measured) -> Iterator[Any]:
    """The model's own scores, as metrics.json has them, for the card's model-index."""
    from huggingface_hub import EvalResult

    test, scores = run.sources.get("test", {}), run.metrics["models"][run.model]
    given = run.params["fetch"]["sources"]["test"]
    name = test.get("repo") or f"test problems of mathmind's profile {run.params['profile']}"
    for metric, title in (("pass_at_1", "pass@1, greedy"), ("bleu", "BLEU (sacrebleu) against the worked solution")):
        yield EvalResult(
            task_type="text-generation", task_name="Grade-school maths", metric_type=metric.replace("_at_", "@"), metric_name=title,
            metric_value=scores[metric], dataset_type=test.get("repo") or f"mathmind-{run.params['profile']}", dataset_name=name,
            dataset_config=given["config"], dataset_split=given["split"], dataset_revision=test.get("revision"),
        )  # fmt: skip


def _title(model: str) -> str:
    return {"base": "base model", "sft": "SFT", "qlora": "QLoRA", "grpo": "GRPO", "orpo": "ORPO"}[model]


def _base(run: Measured) -> str:
    """What the base is, as a clause."""
    if run.base_source:
        return f"[{run.base_source['repo']}](https://huggingface.co/{run.base_source['repo']}) at {run.base_source['revision'][:12]}"
    if not run.made_from_nothing:
        return f"a model of its makers' own (the folder {run.params['base_model']['folder']})"
    weights = run.records.get("base-model", {}).get("weights")
    return f"a Qwen2-shaped model{f' of {weights:,} weights' if weights else ''}, pretrained from nothing for this comparison"


def _scores(run: Measured) -> Iterator[tuple[str, Row]]:
    """The rows of the table of scores: the model, its GGUF form, and what it started from."""
    names = {run.model: "**this model**", f"{run.model}-gguf": f"this model, GGUF {run.asking.scored}"}
    names |= {"sft": "sft, which it started from"} if run.model == "grpo" else {}
    names |= {"base": "the base, asked in its best way"} if run.model != "base" else {}
    return ((title, run.metrics["models"][name]) for name, title in names.items() if name in run.metrics["models"])


def _pairs(run: Measured) -> Iterator[tuple[str, Row]]:
    """The paired tests that the model was in."""
    return ((name.replace("_vs_", " against "), pair) for name, pair in run.metrics["pairs"].items() if run.model in name.split("_vs_"))


def _parameters(run: Measured) -> str:
    """The sections of params.yaml that shaped the weights, as YAML, from the lock; those of data apart, which are many."""
    from ruamel.yaml import YAML
    from ruamel.yaml.compat import StringIO

    sections: Row = {}
    for name in run.lineage():
        if name not in ("fetch", "prepare-mix", "preference-pairs"):
            sections |= run.lock[name].get("params", {}).get("params.yaml", {})
    text, yaml = StringIO(), YAML()
    yaml.width = 120
    yaml.dump(json.loads(json.dumps(sections)), text)
    return text.getvalue().rstrip()


def _data(run: Measured) -> Iterator[Row]:
    """What the model was made of and tested on, a row each."""
    scored = {"test": run.sources["test"]} if "test" in run.sources else {}
    for name, source in {**run.ingredients, **scored}.items():
        if source.get("repo"):
            kind = "" if name == BASE else "datasets/"
            origin = f"[{source['repo']}](https://huggingface.co/{kind}{source['repo']}) at {source['revision'][:12]}"
        else:
            origin = ORIGINS.get(source["kind"], f"answers of {source.get('model')}")
        digests = ", ".join(file["sha256"][:16] for file in source.get("files", ())[:3])
        used = {"test": "scored on, never trained on", "validation": "decides when training stops", BASE: "trained from"}
        yield {"name": name, "origin": origin, "rows": source.get("rows"), "licence": in_words(source), "sha256": digests,
               "used": used.get(name, "trained on")}  # fmt: skip


def _runs(run: Measured) -> Iterator[tuple[str, Row]]:
    """The records of the stages that made the weights, where they are of those very runs."""
    return ((name, run.records[name]) for name in run.lineage() if name in run.records)

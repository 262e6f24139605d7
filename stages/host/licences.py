"""May a model be given on: the terms of its base and of what it was trained on, as `mathmind pin` has written them down.

What is known is held to what licences say of adapted works, and what is not known is refused until somebody has read it. The
careful reading is taken throughout: weights count as an adaptation of the texts that they were trained on.
"""

from collections.abc import Collection, Mapping
from typing import Any

from stages.harness.errors import InputError

Row = dict[str, Any]

# As the hub names licences: what is made of the source may be given on under any terms, where the source is named.
OPEN = frozenset({
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "isc", "mit", "ms-pl", "ncsa", "odc-by", "pddl", "unlicense", "wtfpl", "zlib",
})  # fmt: skip
# Under the source's own terms alone: share alike, or not for money.
ALIKE = frozenset({
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "gfdl", "odbl",
})  # fmt: skip
# Not at all.
WHOLE_ONLY = frozenset({"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"})

BASE, TEACHER = "base-model", "teacher"
READS = {"base": (), "qlora": ("reasoning", "chat"), "sft": ("reasoning",), "grpo": ("reasoning", "rl")}  # and orpo: see below


def ingredients(model: str, params: Mapping[str, Any], sources: Mapping[str, Row], base_source: Row | None) -> dict[str, Row]:
    """What a model's weights come from, by name: its base where that was not made here, sources, a teacher's replies.

    The test is no part of them. `sources` is data/raw/sources.json, `base_source` a published base's source.json.
    """
    base, pairs = params["base_model"], params["preference_pairs"]
    taught = model == "orpo" and pairs["origin"] == "base" and pairs["accepted"] == TEACHER
    orpo = ("reasoning",) if pairs["origin"] == "base" else ("preferences",)
    names = [*(base["sources"] if base["kind"] == "pretrain" else ()), *(orpo if model == "orpo" else READS[model])]
    if model in ("qlora", "sft", "grpo"):
        names.append("validation")  # decides when training stops
    found = {BASE: {"kind": "hub", **base_source}} if base_source else {BASE: {"kind": "local"}} if base["kind"] == "local" else {}
    found |= {name: sources[name] for name in dict.fromkeys(names) if name in sources}
    return found | ({TEACHER: {"kind": TEACHER, "model": pairs["teacher"]["model"]}} if taught else {})


def forbidden(made_of: Mapping[str, Row], read: Collection[str]) -> list[str]:
    """Why a model of these ingredients may not be given on, a sentence each; `read` names those whose terms somebody has read.

    Raises InputError for a name that is none of them.
    """
    if unknown := [name for name in read if name not in made_of]:
        raise InputError(f"--terms-read {unknown[0]}: the model is not made of that: name some of {', '.join(made_of) or 'nothing'}")
    found = [sentence for name, source in made_of.items() if (sentence := _forbidden(name, source, name in read))]
    bound = {name: binding for name, source in made_of.items() if name not in read and (binding := _binds(name, source))}
    if not found and len(set(bound.values())) > 1:
        told = " and ".join(f"{name} ({licence})" for name, licence in bound.items())
        found.append(f"{told} each ask that what is made of them is given on under their own terms, which are not the same: leave one out")
    return found


def licence_of(made_of: Mapping[str, Row], own: str | None) -> dict[str, str]:
    """license, license_name, license_link of a model for its card: its ingredients', where they ask for that, else `own`.

    `own` is what its makers give it under, where they may choose. Raises InputError where they may not.
    """
    binding = next((source for name, source in made_of.items() if _binds(name, source)), None) or made_of.get(BASE)
    terms = {name: binding[name] for name in ("license", "license_name", "license_link") if binding and binding.get(name)}
    if own and terms and own != terms.get("license"):
        raise InputError(f"--license {own}: what the model is made of asks for {in_words(terms)}: leave --license out")
    return terms or ({"license": own} if own else {})


def in_words(source: Row) -> str:
    """A source's licence as its card names it."""
    if source.get("kind") == "generator":
        return "made here"
    return source.get("license_name") or source.get("license") or "not known"


def _forbidden(name: str, source: Row, read: bool) -> str | None:
    licences = _licences(source)
    if source["kind"] == "generator" or licences & WHOLE_ONLY == set() and read:
        return None
    if barred := licences & WHOLE_ONLY:
        return f"{name} ({source['repo']}) is under {', '.join(sorted(barred))}, which forbids to give on what is made of it"
    mend = f"read them, and if they allow that what is made of it is given on, say so with --terms-read {name}"
    if source["kind"] != "hub":
        what = "a local file" if source["kind"] == "local" else f"answers of {source['model']}"
        return f"the terms of {name} ({what}) are not known here: {mend}"
    if source.get("gated"):
        return f"{name} ({source['repo']}) is gated, and its terms are not known here: {mend}"
    if not licences <= OPEN | ALIKE or not licences:
        link = f" ({source['license_link']})" if source.get("license_link") else ""
        return f"{name} ({source['repo']}) is under terms that are not known here, {in_words(source)}{link}: {mend}"
    return None


def _binds(name: str, source: Row) -> str | None:
    """The licence that what is made of a source must carry too, if it asks for that; terms not known here bind through the base alone."""
    licences = _licences(source)
    if not licences or licences <= OPEN:
        return None
    return in_words(source) if name == BASE or licences & ALIKE else None


def _licences(source: Row) -> set[str]:
    return set((source.get("license") or "").split(", ")) - {""}

"""preference-pairs: for each problem a good answer and one that the base itself got wrong.

The base is asked as it knows best (the few-shot prompt); an answer that ends in the right form with the wrong number is
rejected against the source's own solution. So the pair differs in the arithmetic and not in the style. The pairs are in
the Alpaca form, the one that orpo trains on.
"""

from pathlib import Path

from pydantic import Field

from stages.corpus import chat_format, mixing, schemas
from stages.harness import measures
from stages.harness.errors import InputError
from stages.harness.jsonl import read_json, write_json, write_rows
from stages.harness.params import StageParams
from stages.inference.asking import until_stop_text
from stages.inference.engine import Sampling
from stages.scoring.answers import equal, extract_strict, gold_text, parse_number


class Params(StageParams):
    """How the base is sampled, and what becomes of the answers."""

    seed: int
    questions: int = Field(gt=0)
    samples: int = Field(gt=0)
    temperature: float = Field(gt=0)
    batch_size: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)
    max_tokens: int = Field(gt=0)
    validation_share: float = Field(ge=0, lt=1)


def run(p: Params, *, raw: Path, base: Path, mix: Path, out: Path) -> None:
    """Writes out/{train,validation}.jsonl ({"id", "prompt", "chosen", "rejected"}), a template, and account.json."""
    from stages.inference.transformers_engine import TransformersEngine

    account = mixing.Account()
    schema = read_json(raw / "sources.json")["reasoning"]["schema"]
    problems = account.keep(
        "problems",
        schemas.problems(raw / "reasoning" / "rows.jsonl", schema),
        answer_is_no_number=lambda problem: parse_number(problem.answer) is None,
        no_working=lambda problem: not problem.working,
    )
    problems = mixing.shuffled(problems, p.seed, "preference pairs")[: p.questions]

    engine = TransformersEngine.from_folder(base, p.batch_size)
    asked = (mix / "prompts" / "few_shot.jinja").read_text(encoding="utf-8")
    prompts = [chat_format.render(asked, problem.question) for problem in problems for _ in range(p.samples)]
    completions = engine.generate(prompts, Sampling(p.max_new_tokens, p.temperature, p.seed))
    measures.note(tokens=sum(completion.tokens for completion in completions))

    answers = [until_stop_text(completion, "few_shot").text.strip() for completion in completions]
    sampled = [(problem, answers[place * p.samples + n]) for place, problem in enumerate(problems) for n in range(p.samples)]
    wrong = account.keep(
        "sampled answers",
        sampled,
        no_number_declared=lambda pair: parse_number(extract_strict(pair[1]) or "") is None,
        right=lambda pair: equal(extract_strict(pair[1]), parse_number(pair[0].answer)),
    )
    rows = list({problem.id: _pair(problem, rejected) for problem, rejected in reversed(wrong)}.values())[::-1]

    template = chat_format.alpaca()

    def too_long(row: dict[str, str]) -> bool:
        longest = max(row["chosen"], row["rejected"], key=len)
        return len(engine.tokenizer(row["prompt"] + longest)["input_ids"]) + 1 > p.max_tokens

    rows = account.keep("pairs", rows, too_long=too_long)
    train, validation = mixing.held_out(rows, p.validation_share)
    if not train or not validation:
        raise InputError("data/pairs would be empty: the base answered nothing wrong in the right form; raise "
                         "preference_pairs.questions, samples or temperature")  # fmt: skip
    account.used("pairs", train=len(train), validation=len(validation))
    write_rows(out / "train.jsonl", train)
    write_rows(out / "validation.jsonl", validation)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(out / "account.json", account.as_json())


def _pair(problem: schemas.MathProblem, rejected: str) -> dict[str, str]:
    return {
        "id": problem.id,
        "prompt": chat_format.render(chat_format.alpaca(), problem.question),
        "chosen": chat_format.gsm8k_answer(problem.working, gold_text(problem.answer)),
        "rejected": rejected,
    }

"""Putting test problems to a model and judging its answers, the same for every engine."""

import hashlib

from stages.corpus.chat_format import STOP_TEXTS, render
from stages.inference.engine import Completion, Engine, Sampling
from stages.scoring.answers import gold_answer
from stages.scoring.verdicts import Row, judge


def ask(engine: Engine, prompt: str, template: str, test: list[Row], sampling: Sampling) -> list[Row]:
    """Asks each test question, in the way that `prompt` names and `template` renders.

    Returns one prediction row a question, in the order of the test: what was asked, what came back, and the verdict.
    """
    asked = [render(template, row["question"]) for row in test]
    completions = engine.generate(asked, sampling)
    return [
        _prediction(prompt, text, row, until_stop_text(completion, prompt))
        for row, text, completion in zip(test, asked, completions, strict=True)
    ]


def until_stop_text(completion: Completion, prompt: str) -> Completion:
    """A completion up to the text that ends an answer in this way of asking, where there is one and the model wrote it."""
    stop_text = STOP_TEXTS.get(prompt)
    before, found, _ = completion.text.partition(stop_text) if stop_text else (completion.text, "", "")
    return Completion(before, "stop", completion.tokens) if found else completion


def _prediction(prompt: str, asked: str, row: Row, completion: Completion) -> Row:
    verdict = judge(completion.text, gold_answer(row["answer"]))
    return {
        "id": row["id"],
        "prompt": prompt,
        "prompt_sha256": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "completion": completion.text,
        "answer": verdict.answer,
        "correct": verdict.correct,
        "correct_flexible": verdict.correct_flexible,
        "finish_reason": completion.finish_reason,
        "tokens": completion.tokens,
    }

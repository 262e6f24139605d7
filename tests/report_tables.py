"""Parquet files of the report's schemas and sizes, filled with text of our own: what the published sets look like to a reader.

Nearly all reasoning rows and a tenth of the chats are as long as asked for or longer: three rows of the mix in four.
"""

import random
from pathlib import Path
from typing import Any

REASONING, CHATS, PROMPTS, PAIRS, TEST = 19_252, 100_000, 14_116, 2_000, 1_319

_WORDS = """the a of to is we in that and so then for this it which have need find let value number equation both sides since
because gives means first second term sum product difference squared divided multiplied times angle triangle circle radius
length area perimeter probability total remaining each every another same different integer positive negative even odd
prime factor divisor multiple root function polynomial coefficient constant variable solve check substitute expand simplify
wait okay hmm actually maybe however therefore suppose consider similarly next finally again correct mistake careful
computed formula theorem property parallel perpendicular line point plane vector matrix sequence series limit derivative
people apples boxes minutes hours miles dollars books students classes rows columns cards marbles tickets games days weeks""".split()
_SYMBOLS = [
    r"\frac{{{}}}{{{}}}",
    "x^{} + {}",
    r"\sqrt{{{}{}}}",
    "{} \\times {}",
    "a_{} = {}",
    "({}, {})",
    "{} = {}",
    r"\pi r^{} / {}",
]


def write_tables(folder: Path, seed: int = 0, tokens: int = 60, rows: float = 1.0) -> dict[str, Path]:
    """Writes a parquet file a source of params/report-t4.yaml, and returns them by the source's name.

    `tokens` is about the least of a long row's Qwen2 tokens; `rows` is the share of the published sizes, the test apart.
    """
    chance = random.Random(seed)
    sentences, tested = ([_sentence(chance) for _ in range(4000)] for _ in range(2))
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "reasoning": [_reasoning(chance, sentences, tokens, number) for number in range(int(REASONING * rows))],
        "chat": [_chat(chance, sentences, tokens) for _ in range(int(CHATS * rows))],
        "rl": [_prompt(chance, sentences) for _ in range(int(PROMPTS * rows))],
        "preferences": [_pair(chance, sentences) for _ in range(int(PAIRS * rows))],
        "test": [_gsm8k(chance, tested) for _ in range(TEST)],
    }
    return {name: _write(folder / f"{name}.parquet", table) for name, table in made.items()}


def local_sources(files: dict[str, Path], sources: dict[str, Any], sha256: Any) -> dict[str, Any]:
    """A profile's fetch.sources, its hub sources taken from local files instead; `sha256` hashes a file."""
    return {
        name: {**source, "kind": "local", "file": files[name].name, "sha256": sha256(files[name])}
        if name in files
        else source
        for name, source in sources.items()
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _sentence(chance: random.Random) -> str:
    said = [chance.choice(_WORDS) for _ in range(chance.randint(4, 16))]
    for _ in range(chance.randint(0, 2)):
        said.insert(
            chance.randrange(len(said)), chance.choice(_SYMBOLS).format(chance.randint(2, 99), chance.randint(2, 999))
        )
    return " ".join(said).capitalize() + chance.choice([".", ".", ".", ",", ":", "?"])


def _text(chance: random.Random, sentences: list[str], tokens: float) -> str:
    """So many sentences of about 19 tokens, with a line end now and then."""
    parts = chance.choices(sentences, k=max(1, round(tokens / 19)))
    return "".join(part + ("\n\n" if place % 5 == 4 else " ") for place, part in enumerate(parts)).strip()


def _question(chance: random.Random, sentences: list[str]) -> str:
    return f"{_text(chance, sentences, 50)} Find {chance.randint(2, 10**6)} of {chance.randint(2, 10**6)}."


def _reasoning(chance: random.Random, sentences: list[str], tokens: int, number: int) -> dict[str, Any]:
    answer = str(chance.randint(1, 10**4)) if chance.random() < 0.7 else rf"\frac{{\pi}}{{{chance.randint(2, 9)}}}"
    length = _length(chance, tokens, 0.97)
    solution = f"<think>\n{_text(chance, sentences, length)}\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."
    return {
        "expected_answer": answer,
        "problem_type": "has_answer_extracted",
        "problem_source": "aops_c4_high_school_math",
        "generation_model": "DeepSeek-R1",
        "pass_rate_72b_tir": f"0.{number % 100:02d}",
        "problem": _question(chance, sentences),
        "generated_solution": solution,
        "inference_mode": "cot",
    }


def _chat(chance: random.Random, sentences: list[str], tokens: int) -> dict[str, Any]:
    turns = [{"from": "system", "value": _text(chance, sentences, 20)}] if chance.random() < 0.2 else []
    exchanges = chance.choice([1, 1, 1, 2, 3])
    length = _length(chance, tokens, 0.1) / exchanges
    for _ in range(exchanges):
        turns += [
            {"from": "human", "value": _question(chance, sentences)},
            {"from": "gpt", "value": _text(chance, sentences, length)},
        ]
    return {"conversations": turns, "source": "infini-instruct-top-500k", "score": chance.random()}


def _length(chance: random.Random, tokens: int, long: float) -> float:
    """Tokens of a row: the share `long` has `tokens` and more, a third more in the mean; the rest has fewer."""
    return tokens * (1 + chance.expovariate(3)) if chance.random() < long else tokens * chance.uniform(0.1, 0.8)


def _prompt(chance: random.Random, sentences: list[str]) -> dict[str, Any]:
    answer = str(chance.randint(1, 999))
    return {"prompt": _question(chance, sentences), "solution": answer, "data_source": "math_dapo", "ability": "MATH"}


def _pair(chance: random.Random, sentences: list[str]) -> dict[str, Any]:
    answers = {
        name: f"{_text(chance, sentences, 100)} #### {chance.randint(2, 99)}" for name in ("accepted", "rejected")
    }
    return {"prompt": _question(chance, sentences), **answers}


def _gsm8k(chance: random.Random, sentences: list[str]) -> dict[str, Any]:
    value = chance.randint(2, 5000)
    return {
        "question": _question(chance, sentences),
        "answer": f"{_text(chance, sentences, 60)} <<2*3=6>>6\n#### {value:,}",
    }

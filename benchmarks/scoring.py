"""Measures `mathmind score` from its start to its end: 1,319 predictions of 300 tokens each, as GSM8K's test set has.

    python -m benchmarks.scoring
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROBLEMS, WORDS, RUNS = 1319, 230, 5  # 230 words are some 300 tokens
STOCK = "She sells the rest of 9 * 2 = $18. eggs, each day 1,018.5 and so 3/4 of them makes (50%) more than before".split()

with tempfile.TemporaryDirectory() as folder:
    gold, predictions = Path(folder, "gold.jsonl"), Path(folder, "predictions.jsonl")
    chance = random.Random(1)
    texts = [" ".join(chance.choices(STOCK, k=WORDS)) for _ in range(2 * PROBLEMS)]
    rows = [{"question": "?", "answer": f"{text}\n#### {number}"} for number, text in enumerate(texts[:PROBLEMS])]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": number, "completion": f"{text}\n#### {number % 700}"} for number, text in enumerate(texts[PROBLEMS:])]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    command = [sys.executable, "-m", "stages", "score", "--predictions", str(predictions), "--gold", str(gold), "--json"]
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
print(f"mathmind score, {PROBLEMS} predictions of {WORDS} words: {min(seconds):.2f} to {max(seconds):.2f} s")

"""Generation with transformers' own `generate`: the reference engine, on a CPU or a GPU."""

from collections.abc import Sequence
from pathlib import Path

from stages.harness.arithmetic import read_work_space_once, use_portable_arithmetic
from stages.harness.progress import progress
from stages.harness.workers import side_by_side
from stages.inference.engine import Completion, Sampling, in_order


class TransformersEngine:
    """A model in memory; prompts run in batches of like length, padded on the left."""

    def __init__(self, model, tokenizer, batch_size: int, workers: int = 1) -> None:
        """`tokenizer` pads on the left; the model stays in the mode it is in; on a CPU so many processes share greedy batches."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.workers = 1 if model.device.type == "cuda" else workers
        self.template = tokenizer.chat_template

    @classmethod
    def from_folder(cls, folder: Path, batch_size: int, workers: int = 1) -> "TransformersEngine":
        """16-bit weights stay so on a GPU and are widened to 32 bits on a CPU, which computes faster so."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        use_portable_arithmetic()
        read_work_space_once()
        gpu = torch.cuda.is_available()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if gpu else torch.float32)
        return cls(model.to("cuda" if gpu else "cpu").eval(), tokenizer, batch_size, workers)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """See Engine. Sampling draws from torch's generator, seeded here, so the same call gives the same answers."""
        return in_order([self.part_of(prompts, sampling)])

    def part_of(self, prompts: Sequence[str], sampling: Sampling, part: int = 0, parts: int = 1) -> dict[int, Completion]:
        """The completions by their prompts' places, of one engine's part where so many share them: whole batches, in turn.

        The first takes all where they are sampled: what a batch draws depends on those before it.
        """
        import torch
        from transformers import GenerationConfig

        torch.manual_seed(sampling.seed)
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"temperature": sampling.temperature, "top_k": 0} if sampling.temperature > 0 else {}),
        )
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

        def answers(batch: list[int]) -> list[Completion]:
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                outputs = self.model.generate(**inputs, generation_config=config)
            return [self._completion(row, stops) for row in outputs[:, inputs["input_ids"].shape[1] :].tolist()]

        workers = 1
        if sampling.temperature == 0:
            workers = self.workers
            batches.reverse()  # the longest first, so that no process ends much later than the others
            batches = batches[part::parts]
        elif part:
            batches = []
        completions: dict[int, Completion] = {}
        with progress("generate", sum(map(len, batches))) as advance:
            for batch, found in side_by_side(answers, batches, workers):
                completions.update(zip(batch, found, strict=True))
                advance(len(batch))
        return completions

    def mean_log_probabilities(self, answers: Sequence[tuple[str, str]]) -> list[float]:
        """For each (prompt, answer), the mean log-probability, in nats, that the model gives the answer's tokens."""
        import torch

        ids = [
            self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*answers, strict=True)
        ]
        found = []
        with torch.inference_mode():
            for prompt, answer in zip(*ids, strict=True):
                tokens = torch.tensor([prompt + answer], device=self.model.device)
                logits = self.model(input_ids=tokens, logits_to_keep=len(answer) + 1).logits[0, :-1]
                chosen = logits.float().log_softmax(-1).gather(-1, tokens[0, len(prompt) :, None])
                found.append(chosen.mean().item())
        return found

    def _completion(self, row: list[int], stops: list[int]) -> Completion:
        end = next((place for place, token in enumerate(row) if token in stops), None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
        return Completion(text, "length" if end is None else "stop", len(row) if end is None else end + 1)

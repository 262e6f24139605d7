"""Updates by grpo's trainer on completions that follow from their places, in as many processes as are started together.

    python -m tests.pipeline.canned_grpo OUT          # in the small run's folder

For each variant the first writes the prompts that were asked for, update by update, and the adapter that was trained.
"""

import random
import sys
from functools import partial
from itertools import chain
from pathlib import Path

from stages.harness import ranks
from stages.harness.jsonl import write_json
from stages.harness.params import read_params, section
from stages.training.rollouts_apart import RolloutsApart, read_trained, write_trained

PACKED = {"rows": None, "recompute": None, "dequantise": None, "compile": False, "memory_gib": None}
VARIANTS = {  # name -> changes of grpo's section, over 8 completions an update
    "padded": {"accumulation": 2},
    "packed": {"packed": PACKED},  # log-probabilities are computed once, for correction and loss
    "little-room": {"packed": {**PACKED, "memory_gib": 1.316}},  # as `packed`, where layers are recomputed
    "kl": {"beta": 0.1, "loss": "grpo", "updates_per_batch": 2, "accumulation": 2},
    "apart": {"packed": PACKED},  # as `packed`, by two engines in processes of their own; only where several train
}
UPDATES = 3
LONGEST = 12  # tokens of a completion


class Canned:
    """Completions of any tokens, and their log-probabilities as the model has them."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def generate(self, prompts, model, *, step: int, first: int, stop: int, **_):
        import torch

        self.asked.append([list(prompt) for prompt in prompts])
        completions, logprobs = [], []
        for place, prompt in enumerate(prompts, first):
            draw = random.Random(f"{step}/{place}")
            completions.append([*(draw.randrange(5, 200) for _ in range(draw.randrange(3, LONGEST))), stop])
            ids = torch.tensor([[*prompt, *completions[-1]]])
            with torch.no_grad():
                chances = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(chances.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist())
        return completions, logprobs


class CannedApart(Canned):
    """The same in a process that has a base of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from stages.training.models import Transformers

        assert ranks.size() == 1
        self.folder = folder
        self.model = Transformers("fp32").held_adapter(Transformers("fp32").load_base(Path("base")), Path("sft")).eval()

    def ready(self) -> None:
        pass

    def generate(self, prompts, **asked):
        read_trained(self.model, self.folder)
        return super().generate(prompts, self.model, **asked)


def judge(completion_ids, **_) -> list[float]:
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def train(name: str, out: Path) -> None:
    from safetensors.torch import save_file
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig

    from stages.corpus.marks import TURN_END
    from stages.grpo import Params
    from stages.training.models import Transformers, load_tokenizer
    from stages.training.packing import PackedRows
    from stages.training.rollouts import rollout_trainer
    from stages.training.trainer import arguments, dataset

    values = read_params(Path("params.yaml"))
    changed = {"max_steps": UPDATES, "log_every": 1, "lr": 1e-3, "save_every": 1000, **VARIANTS[name]}
    changed["per_device_batch"] = 8 // changed.get("accumulation", 1)
    p = section(Path("params.yaml"), values | {"grpo": values["grpo"] | changed}, "grpo", Params)
    scratch = out / f"{name}-{ranks.size()}"
    packing = PackedRows(p, Path("base"), scratch, rank=16, longest=96, nf4=False, by_batch=True, whole=True) if p.packed else None
    assert packing is None or packing.plan.recompute == (name == "little-room")
    base = Transformers("fp32").load_base(Path("base"))
    model = Transformers("fp32").held_adapter(packing.prepare(base) if packing else base, Path("sft"))
    trainer = rollout_trainer()(
        model=model,
        reward_funcs=[judge],
        args=GRPOConfig(
            **arguments(p, scratch) | (packing.arguments if packing else {}),
            num_generations=p.generations, num_iterations=p.updates_per_batch, max_completion_length=LONGEST, temperature=1.0,
            beta=p.beta, loss_type=p.loss, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="sequence_mask",
            vllm_importance_sampling_clip_max=3.0, save_strategy="no",
        ),
        train_dataset=dataset(Path("mix/grpo/train.jsonl"), ("prompt", "answer")),
        processing_class=load_tokenizer(Path("base"), Path("mix/grpo/chat_template.jinja"), ends_with=TURN_END),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    rollouts = Canned()
    trainer.rollouts, trainer.packing = rollouts, packing
    if name == "apart":
        folder = out / f"brought-{ranks.size()}"
        trainer.rollouts = RolloutsApart(partial(CannedApart, folder), [""] * 2, partial(write_trained, folder=folder, dtype="float32"))
    trainer.train()
    if name == "apart":
        trainer.rollouts.close()
    asked = ranks.everybody(rollouts.asked)
    if ranks.is_first():
        told = [{figure: value for figure, value in log.items() if "time" not in figure} for log in trainer.state.log_history[:-1]]
        write_json(out / f"{name}-{ranks.size()}.json", {"asked": [list(chain(*parts)) for parts in zip(*asked)], "told": told})
        trained = {key: weight.detach() for key, weight in model.named_parameters() if ".default." in key}
        save_file(trained, out / f"{name}-{ranks.size()}.safetensors")


if __name__ == "__main__":
    ranks.meet()
    for each in VARIANTS if ranks.size() > 1 else list(VARIANTS)[:-1]:
        train(each, Path(sys.argv[1]))

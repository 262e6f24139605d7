"""GRPO by trl's own trainer with vLLM colocated, as its documentation sets it: the peer of training_speed.py, which starts this.

    python benchmarks/trl_grpo.py SECTION

SECTION is the grpo section of params.yaml as JSON; base, sft and mix are read from the working folder. A line of JSON says the median
seconds of an update and the most memory that torch reserved.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.harness import measures  # noqa: E402
from stages.harness.arithmetic import WORK_SPACE  # noqa: E402


def main(section: dict) -> None:
    os.environ.pop(WORK_SPACE, None)  # ours, which costs it time (stages/harness/arithmetic.py)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from stages.corpus.tokenizer_files import marks_of
    from stages.grpo import ANSWER_REWARDS
    from stages.training.models import load_tokenizer
    from stages.training.rewards import match_format_approximately, match_format_exactly
    from stages.training.trainer import dataset, pace

    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16, device_map="cuda")
    base.config._name_or_path = str(Path("base").absolute())  # trl gives its engine this name
    model = PeftModel.from_pretrained(base, "sft", is_trainable=True)
    tokenizer = load_tokenizer(Path("base"), Path("mix/grpo/chat_template.jinja"), ends_with=marks_of(Path("base")).turn_end)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[match_format_exactly, match_format_approximately, ANSWER_REWARDS[section["answer_reward"]]],
        args=GRPOConfig(
            output_dir="trl", report_to="none", seed=0, bf16=True, learning_rate=section["lr"], optim=section["optimizer"],
            per_device_train_batch_size=section["per_device_batch"], gradient_accumulation_steps=section["accumulation"],
            max_steps=section["max_steps"], logging_steps=1, save_strategy="no", gradient_checkpointing=True, disable_tqdm=True,
            num_generations=section["generations"], max_completion_length=section["max_completion"], temperature=section["temperature"],
            top_p=section["top_p"], min_p=section["min_p"], beta=section["beta"], loss_type=section["loss"],
            use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=section["max_prompt"] + section["max_completion"],
            vllm_importance_sampling_correction=True,
        ),
        train_dataset=dataset(Path("mix/grpo/train.jsonl"), ("prompt", "answer")),
        processing_class=tokenizer,
        callbacks=[pace()],
    )  # fmt: skip
    trainer.train()
    print(json.dumps({"end": "ended", "update_seconds": measures.noted()["update_seconds"], "updates": trainer.state.global_step,
                      "peak_gpu_memory_mib": torch.cuda.max_memory_reserved() // 2**20}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

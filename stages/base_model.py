"""base-model: the model that every method starts from.

`pretrain` trains a tokenizer and a small Qwen2 from nothing on the documents that fetch brought; `hub` takes a published
model at a pinned commit, `local` one that the user keeps, its weights as they are. The folder carries no chat template: eval
asks a base model in several ways and says which.
"""

from pathlib import Path
from typing import Literal

from stages.corpus.sources_lock import pinned_model
from stages.harness import ranks
from stages.harness.errors import InputError
from stages.training.curves import Curve
from stages.training.pretraining import Pretraining, pretrain
from stages.training.ready_made import take_local, take_published


class Params(Pretraining):
    """`pretrain` uses what Pretraining says, `hub` only `repo`, `local` only `folder` and `sha256`."""

    kind: Literal["pretrain", "hub", "local"]
    repo: str | None  # hub: the model's name; its commit stands in params/sources.lock.yaml
    folder: str | None  # local: a folder below run.local_files with config, safetensors and tokenizer
    sha256: str | None  # local: what its files must be; a run says what they are


def run(
    p: Params, *, raw: Path, sources_lock: Path, local_files: Path, checkpoints: Path, out: Path, out_curve: Path
) -> None:
    """Writes a model folder (config, weights, tokenizer, generation config) and the loss curve.

    A model that others made has no curve of ours, so it is empty, and source.json says where the model is from and, where
    it is published, on what terms.
    """
    if p.kind != "pretrain" and not ranks.is_first():
        return
    match p.kind:
        case "hub":
            if p.repo is None:
                raise InputError("params.yaml: base_model.repo: a hub model needs it, such as Qwen/Qwen1.5-4B")
            take_published(pinned_model(sources_lock, p.repo), checkpoints, out)
            Curve().write(out_curve)
        case "local":
            if p.folder is None:
                raise InputError("params.yaml: base_model.folder: a local model needs it, the name of a folder below run.local_files")
            take_local(p.folder, p.sha256, local_files, out)
            Curve().write(out_curve)
        case "pretrain":
            curve = pretrain(p, raw, checkpoints, out)
            if ranks.is_first():
                curve.write(out_curve)

"""sft's and qlora's trainer: trl's own for padded rows; for rows without padding one whose host never waits for the GPU but to log."""

from collections import defaultdict

from stages.training.dealing import by_wrapper, dealt
from stages.training.packing import PackedRows, Padded, answer_loss
from stages.training.sharding import whole


def supervised_trainer(rows: Padded | PackedRows) -> type:
    """trl's SFTTrainer as a class that computes rows as they lie."""
    import torch
    from trl import SFTTrainer

    if isinstance(rows, Padded):
        return dealt(SFTTrainer)

    class PackedTrainer(SFTTrainer):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            self.train_dataset = self.train_dataset.with_format("numpy")  # a row of Python's numbers takes milliseconds
            self.counts = defaultdict(list)  # of micro-batches since the last log: labels, tokens, and their sums on the GPU

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """trl's chunked loss over num_items_in_batch labels of all processes' micro-batches, else the mean of this one's."""
            labels, places = inputs.pop("labels"), inputs.pop("places")
            base = self.model.get_base_model()

            def forward():
                hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state
                return answer_loss(hidden, whole(base.get_output_embeddings().weight), labels, places, compiled=rows.p.compile)

            with self.accelerator.autocast():
                loss, *sums = by_wrapper(model, self.model, forward, labels)
            self.counts["train" if self.model.training else "eval"].append((len(places), labels.numel(), *sums))
            if num_items_in_batch is None:
                loss = loss / max(len(places), 1)
            else:
                loss = loss / num_items_in_batch * self.accelerator.num_processes  # data parallelism takes the mean of processes
            return (loss, {}) if return_outputs else loss

        def log(self, logs, start_time=None):
            """trl's figures, over all labels since the last log."""
            mode = "train" if self.model.training else "eval"
            if counts := self.counts.pop(mode, None):
                own = [sum(map(float, each)) for each in zip(*counts, strict=True)]
                sums = torch.tensor(own, device=self.accelerator.device, dtype=torch.double)
                labels, tokens, correct, entropy = self.accelerator.reduce(sums, "sum").tolist()
                if mode == "train":
                    self._total_train_tokens += int(tokens)
                figures = {"entropy": entropy / max(labels, 1), "mean_token_accuracy": correct / max(labels, 1), "num_tokens": self._total_train_tokens}
                self._metrics[mode] |= {name: [figure] for name, figure in figures.items()}
            super().log(logs, start_time)

    return dealt(PackedTrainer)

"""ORPO's pairs without padding: chosen and rejected answers of a micro-batch lie one after another, each after its prompt."""

from stages.training.logprobs import packed_logprobs
from stages.training.packing import IGNORED, PackedRows


def pair_trainer():
    """trl's ORPOTrainer as a class that computes pairs unpadded where it has been given a `packing`."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    class PairTrainer(ORPOTrainer):
        packing: PackedRows | None = None
        together = 1  # pairs whose tokens share one mean in the likelihood term: trl's micro-batch, whatever is computed at once

        def get_batch_samples(self, *asked):
            batches, items = super().get_batch_samples(*asked)
            self.pairs_a_batch = sum(len(batch["chosen_labels"]) for batch in batches) / max(len(batches), 1)
            return batches, items

        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            if self.packing is None:
                return loss, metrics
            # An epoch's last update may end in a smaller micro-batch, which weighs as much less as it has fewer pairs.
            share = len(batch["chosen_labels"]) / self.pairs_a_batch
            return loss * share, {name: value for name, value in metrics.items() if "logits/" not in name}  # there are none to tell of

        def concatenated_forward(self, model, batch):
            """As trl's: mean log-probabilities of chosen and rejected answers, (pairs,) each, and the likelihood term, in nats."""
            if self.packing is None:
                return super().concatenated_forward(model, batch)
            rows = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
            ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
            base = self.accelerator.unwrap_model(model).get_base_model()
            with self.accelerator.autocast():
                logprobs, _ = packed_logprobs(
                    base.get_decoder(), base.get_output_embeddings().weight, ids, mask, ids.shape[1] - 1,
                    temperature=1.0, longest=self.packing.longest, compiled=self.packing.p.compile,
                )  # fmt: skip
            answer = rows["concatenated_labels"][:, 1:] != IGNORED
            means = (logprobs * answer).sum(1) / answer.sum(1)
            pairs = len(ids) // 2
            groups = zip(logprobs[:pairs].split(self.together), mask[:pairs, 1:].split(self.together), strict=True)
            likelihood = torch.stack([-group.sum() / there.sum() for group, there in groups]).mean()
            nothing = logprobs.new_zeros(())
            return means[:pairs], means[pairs:], nothing, nothing, likelihood

    return PairTrainer

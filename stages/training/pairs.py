"""ORPO's pairs: without padding, where chosen and rejected answers of a micro-batch lie one after another; and over several processes."""

from itertools import chain
from typing import Any

from stages.harness import ranks
from stages.training.dealing import by_wrapper, dealt
from stages.training.logprobs import packed_logprobs
from stages.training.packing import IGNORED, PackedRows
from stages.training.sharding import whole

WEIGHTLESS = "weightless"  # marks the row of a process that got none


def pair_trainer():
    """trl's ORPOTrainer as a class that computes pairs unpadded where it has been given a `packing`."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    class PairTrainer(ORPOTrainer):
        packing: PackedRows | None = None
        together = 1  # pairs whose tokens share one mean in the likelihood term: trl's micro-batch, whatever is computed at once
        share: float | None = None  # of several processes: what the odds-ratio term of this one's micro-batch weighs

        def get_batch_samples(self, *asked):
            batches, items = super().get_batch_samples(*asked)
            if ranks.size() > 1:
                weigh(batches, self.together, by_pairs=self.packing is not None)
            self.pairs_a_batch = sum(len(batch["chosen_labels"]) for batch in batches) / max(len(batches), 1)
            return batches, items

        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            if ranks.size() > 1:
                return self._of_all(model, batch, train_eval)
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            if self.packing is None:
                return loss, metrics
            # An epoch's last update may end in a smaller micro-batch, which weighs as much less as it has fewer pairs.
            share = len(batch["chosen_labels"]) / self.pairs_a_batch
            return loss * share, self._told(metrics)

        def _of_all(self, model, batch, train_eval):
            """The loss as `weigh` has it, with figures that are means over all processes."""
            self.share = batch["share"]
            self.accelerator.gather_for_metrics = lambda value: value  # processes may have unlike numbers of pairs
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            own = [value * (1 if name.endswith("nll_loss") else self.share) for name, value in metrics.items()]
            means = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "mean").tolist()
            metrics = dict(zip(metrics, means, strict=True))
            return loss, metrics if self.packing is None else self._told(metrics)

        def _told(self, metrics):
            return {name: value for name, value in metrics.items() if "logits/" not in name}  # there are none to tell of

        def odds_ratio_loss(self, *logps):
            losses, *figures = super().odds_ratio_loss(*logps)
            return losses if self.share is None else losses * self.share, *figures

        def concatenated_forward(self, model, batch):
            """As trl's: mean log-probabilities of chosen and rejected answers, (pairs,) each, and the likelihood term, in nats."""
            if self.packing is None:
                *found, likelihood = super().concatenated_forward(model, batch)
                return *found, likelihood if self.share is None else likelihood * (batch["weights"] * batch["tokens"]).sum()
            rows = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
            ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
            adapted = self.accelerator.unwrap_model(model)

            answer = rows["concatenated_labels"] != IGNORED
            pairs = len(ids) // 2
            wanted = torch.cat([mask[:pairs].bool(), answer[pairs:]])
            wanted[:, 0] = False
            base = adapted.get_base_model()
            lenders, lent = _beginnings_in_common(ids, mask)
            self.packing.make_room(base.get_decoder(), mask, lent)

            def forward():
                head = whole(base.get_output_embeddings().weight)
                logprobs, _ = packed_logprobs(
                    base.get_decoder(), head, ids, mask, wanted, lenders, lent,
                    temperature=1.0, longest=self.packing.longest, compiled=self.packing.p.compile,
                )  # fmt: skip
                return logprobs

            with self.accelerator.autocast():
                logprobs = by_wrapper(model, adapted, forward, ids)
            means = (logprobs * answer).sum(1) / answer[:, 1:].sum(1)
            if self.share is None:
                groups = zip(logprobs[:pairs].split(self.together), wanted[:pairs].split(self.together), strict=True)
                likelihood = torch.stack([-group.sum() / there.sum() for group, there in groups]).mean()
            else:
                likelihood = -(logprobs[:pairs].sum(1) * batch["weights"]).sum()
            nothing = logprobs.new_zeros(())
            return means[:pairs], means[pairs:], nothing, nothing, likelihood

    return dealt(PairTrainer, lambda row: {**row, WEIGHTLESS: True})


def _beginnings_in_common(ids, mask):
    """Of rows of chosen answers and then of rejected ones: whose beginning each shares, and how many tokens of it; a chosen one none."""
    import torch

    pairs = len(ids) // 2
    alike = (ids[:pairs] == ids[pairs:]).cumprod(1).sum(1)
    shorter = mask.sum(1).view(2, pairs).amin(0)
    nothing, first = torch.zeros_like(alike), torch.arange(pairs, device=ids.device)
    return first.repeat(2), torch.cat([nothing, alike.clamp(max=shorter - 1)])


def weigh(batches: list[dict[str, Any]], together: int, *, by_pairs: bool) -> None:
    """Gives micro-batches what they weigh, so that the mean over all processes' is the loss that one process has.

    That is a mean over groups of `together` pairs, alike or by their numbers of pairs, of the mean likelihood of a group's tokens and the
    mean odds ratio of its pairs. `share`: what the mean odds ratio of a micro-batch's pairs weighs; `weights`, (pairs,): what each
    token of a pair does; `tokens`, (pairs,): how many a pair has.
    """
    import torch

    own = [[] if WEIGHTLESS in batch else (batch["chosen_attention_mask"].sum(1) - 1).tolist() for batch in batches]
    in_turn = list(chain.from_iterable(zip(*ranks.everybody(own), strict=True)))  # all micro-batches, in the rows' order
    pairs = list(chain.from_iterable(in_turn))
    groups = [pairs[start : start + together] for start in range(0, len(pairs), together)]
    alike = [len(group) / len(pairs) if by_pairs else 1 / len(groups) for group in groups]
    odds = [weight / len(group) for weight, group in zip(alike, groups, strict=True) for _ in group]
    likelihoods = [weight / sum(group) for weight, group in zip(alike, groups, strict=True) for _ in group]
    for turn, (batch, tokens) in enumerate(zip(batches, own, strict=True)):
        start = sum(map(len, in_turn[: turn * ranks.size() + ranks.rank()]))
        mine = slice(start, start + len(tokens))
        batch["share"] = len(in_turn) * sum(odds[mine])
        batch["weights"] = len(in_turn) * torch.tensor(likelihoods[mine] or [0.0])
        batch["tokens"] = torch.tensor(tokens or [0]).float()

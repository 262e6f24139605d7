"""How the rows of an update are dealt out over processes: the same rows for any number of them, a turn of micro-batches after another.

accelerate's own dealing repeats rows from the beginning where an epoch's last update has too few. Here a process that gets none has a
row that weighs nothing, so that an update is that of one process but for the order in which sums are taken.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil, gcd
from typing import Any

from stages.harness import ranks
from stages.harness.errors import InputError

Row = dict[str, Any]
NOBODYS = -1  # the place of a row that weighs nothing


def share_of(batch: int) -> int:
    """How many rows of an update are this process's, or InputError where they cannot be dealt out evenly."""
    if batch % ranks.size():
        raise InputError(f"params.yaml: a batch of {batch} (per_device_batch x accumulation) cannot be dealt out over {ranks.size()} processes "
                         "(run.processes on each of run.nodes): take as many processes as divide it")  # fmt: skip
    return batch // ranks.size()


def micro_batches(batch: int, rows: int) -> dict[str, int]:
    """TrainingArguments for an update of `batch` rows by all processes, in micro-batches of `rows` or, where a process has fewer, less."""
    own = share_of(batch)
    rows = gcd(rows, own)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": own // rows}


class Deal:
    """The micro-batches of one process, as places of rows in the order of `places`; every process has equally many.

    Where `lengths` are given, by place, the rows of a turn are dealt out so that all have about as many tokens, for they wait for the one
    that has most; else one after another.
    """

    def __init__(self, places, rows: int, lengths: Sequence[int] | None = None) -> None:
        self.places, self.rows, self.lengths = places, rows, lengths

    def __len__(self) -> int:
        return ceil(len(self.places) / (self.rows * ranks.size()))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.places)
        together = self.rows * ranks.size()
        for start in range(0, len(order), together):
            yield self._shares(order[start : start + together])[ranks.rank()] or [NOBODYS]

    def _shares(self, turn: list[int]) -> list[list[int]]:
        """The rows of a turn as each process gets them."""
        if self.lengths is None or ranks.size() == 1:
            return [turn[start : start + self.rows] for start in range(0, self.rows * ranks.size(), self.rows)]
        shares: list[list[int]] = [[] for _ in range(ranks.size())]
        tokens = [0] * ranks.size()
        for place in sorted(turn, key=lambda place: -self.lengths[place]):
            least = min((rank for rank in range(ranks.size()) if len(shares[rank]) < self.rows), key=tokens.__getitem__)
            shares[least].append(place)
            tokens[least] += self.lengths[place]
        return shares

    def set_epoch(self, epoch: int) -> None:
        self.places.set_epoch(epoch)


class Rows:
    """Rows by their places, and the one that weighs nothing."""

    def __init__(self, rows, weightless: Callable[[Row], Row]) -> None:
        self.rows, self.weightless = rows, weightless

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.weightless(self.rows[0]) if place == NOBODYS else self.rows[place]


def lengths_of(rows) -> list[int] | None:
    """Tokens of each row of a Dataset; None of pairs, whose loss depends on which of them are computed together."""
    if "input_ids" not in rows.column_names:
        return None
    from pyarrow.compute import list_value_length

    return list_value_length(rows.with_format("arrow")["input_ids"]).to_pylist()


def by_wrapper(wrapper, model, compute: Callable[[], Any], argument):
    """What `compute` returns, as the forward pass of a wrapper around the model, if there is one: else no gradients are put together.

    argument: any tensor; on a GPU such a forward pass wants one.
    """
    if wrapper is model:
        return compute()
    from trl.models.utils import _ForwardRedirection

    return _ForwardRedirection()(wrapper, model, lambda *_, **__: compute(), argument)


def unlabelled(row: Row) -> Row:
    """A supervised row of which no token is trained."""
    return {**row, "labels": [-100] * len(row["labels"])}


def dealt(trainer: type, weightless: Callable[[Row], Row] = unlabelled) -> type:
    """A trainer's class that deals rows out so; the class itself where one process trains."""
    if ranks.size() == 1:
        return trainer
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import DataLoader

    class Dealt(trainer):
        def get_train_dataloader(self):
            order = SeedableRandomSampler(self.train_dataset)  # that of one process
            deal = Deal(order, self.args.train_batch_size, lengths_of(self.train_dataset))
            loader = self._loader(self.train_dataset, deal)
            loader.set_epoch = deal.set_epoch
            return loader

        def get_eval_dataloader(self, eval_dataset=None):
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            deal = Deal(range(len(rows)), self.args.eval_batch_size)
            together = deal.rows * ranks.size()
            found = [min(together, len(rows) - start) for start in range(0, len(rows), together)]
            self.shares = iter([rows_there * len(found) / len(rows) for rows_there in found])
            return self._loader(rows, deal)

        def prediction_step(self, *asked, **options):
            """The mean over batches is one over rows, as that of one process."""
            loss, *others = super().prediction_step(*asked, **options)
            return loss * next(self.shares), *others

        def _prepare_input(self, data):
            return data.to(self.args.device, non_blocking=True) if hasattr(data, "to") else super()._prepare_input(data)

        def _loader(self, rows, deal: Deal):
            rows = Rows(self._remove_unused_columns(rows, description="dealt"), weightless)
            return DataLoader(rows, batch_sampler=deal, collate_fn=self.data_collator, pin_memory=self.args.dataloader_pin_memory)

    return Dealt

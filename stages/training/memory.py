"""How large a micro-batch a GPU holds: an estimate in bytes, and the fastest way to train that stays below it."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Self

from stages.harness.errors import InputError
from stages.harness.jsonl import read_json

GIB = 2**30
NF4_BYTES = 0.57  # a weight in 4 bits with its scales
SHARED_NF4_BYTES = 0.53  # where the base is shared out, whose scales stay quantised once more
SCALE_BYTES = 0.03  # of those, its scales: whole in every process
GATHERED = 3  # layers of a base that is shared out, in bytes: one is whole, the next is on its way, and lies twice as it arrives
OPTIMISED_BYTES = 16  # an adapter's weight in 32 bits, its gradient, and two moments
OPTIMISED_BYTES_8_BIT = 10  # with moments in 8 bits
KEPT_MORE = 1.15  # what compiled layers keep of a token, by what `Shape.kept` counts: seen on an H100 at Qwen1.5-4B's shape
NORMALISER = 1 / 16  # bytes that attention's results take beside each of their numbers: 4 of a head, which has 64 at the least
USABLE = 0.92  # of the memory: the rest goes to fragments and to libraries
OUTSIDE = 1.2 * GIB  # the CUDA context, work space of matrix products
# What time a plan takes, beside others: seen on an H200 at Qwen1.5-4B's shape.
HALF_SPEED = 1500  # tokens of a micro-batch at which matrix products reach half of their speed
REMAKING = 100  # tokens that could be trained while 4-bit weights are brought to 16 bits once: 4.3 ms


@dataclass(frozen=True)
class Shape:
    """What of a decoder's shape decides over memory."""

    layers: int
    hidden: int
    query: int  # heads x head size
    keys: int
    ffn: int
    vocab: int
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a model folder's config.json."""
        config = read_json(folder / "config.json")
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            config["num_hidden_layers"], config["hidden_size"], heads * size, config.get("num_key_value_heads", heads) * size,
            config["intermediate_size"], config["vocab_size"], bool(config.get("tie_word_embeddings")),
        )  # fmt: skip

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * self.hidden * (2 * self.query + 2 * self.keys + 3 * self.ffn)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def adapter(self) -> int:
        """Weights of an adapter of rank 1 on every matrix."""
        return self.layers * (7 * self.hidden + 2 * self.query + 2 * self.keys + 3 * self.ffn)

    @property
    def kept(self) -> int:
        """Numbers of a token that a layer keeps for its backward pass."""
        return 4 * self.hidden + 2 * self.query + 2 * self.keys + 3 * self.ffn


@dataclass(frozen=True)
class Plan:
    """How the rows of an update are computed."""

    rows: int  # of a micro-batch
    recompute: bool
    dequantise: bool
    attention: int = 0  # layers whose attention is not recomputed with the rest


@dataclass(frozen=True)
class Needs:
    """Of what a training needs memory; width: bytes of a number; longest: tokens of a row; chunk: tokens whose logits are held.

    beside: bytes that an engine takes in the same process; shares: processes that share the base out; optimised: bytes of a weight of
    the adapter with all that is kept to update it.
    """

    shape: Shape
    rank: int
    nf4: bool
    width: int
    longest: int
    chunk: int
    beside: float = 0
    shares: int = 1
    optimised: int = OPTIMISED_BYTES

    def fits(self, memory_gib: float) -> bool:
        """Whether a GPU holds the base, or its share of it, the adapter and one row."""
        return self.bytes(Plan(1, recompute=True, dequantise=False)) <= USABLE * memory_gib * GIB

    def bytes(self, plan: Plan) -> float:
        """The most that is held at once, with every row of a micro-batch as long as the longest may be."""
        tokens = plan.rows * self.longest
        layer = tokens * self.shape.kept * self.width
        if not plan.recompute:
            return self._standing(dequantise=plan.dequantise) + self._loss + self.shape.layers * layer * KEPT_MORE
        # Each layer's input, and attention's results; then the loss, and after it one layer anew with its gradients.
        held = self.shape.layers * tokens * self.shape.hidden * self.width + plan.attention * self.attention_bytes(plan.rows)
        return self._standing(dequantise=plan.dequantise) + held + max(self._loss, 2 * layer)

    def attention_bytes(self, rows: int) -> float:
        """Of a layer's results of attention."""
        return rows * self.longest * self.shape.query * (self.width + NORMALISER)

    @property
    def _loss(self) -> float:
        """The logits of a chunk, in 32 bits too, and their gradient."""
        return self.chunk * self.shape.vocab * (2 * self.width + 8)

    def layers_kept(self, tokens: int, memory_gib: float, *, dequantise: bool) -> int:
        """In how many layers a micro-batch of so many tokens can keep what they computed, where it is made anew in the others.

        These come first: of them only the inputs are held, and when their turn comes, what the others kept is gone.
        """
        inputs, whole = (self.width * tokens * numbers for numbers in (self.shape.hidden, self.shape.kept * KEPT_MORE))
        room = USABLE * memory_gib * GIB - self._standing(dequantise=dequantise) - self._loss - self.shape.layers * inputs
        return int(min(max(room / (whole - inputs), 0), self.shape.layers))

    def _standing(self, *, dequantise: bool) -> float:
        """What does not grow with the micro-batch."""
        shape = self.shape
        linear = self.width
        if self.nf4 and not dequantise:
            linear = NF4_BYTES if self.shares == 1 else SHARED_NF4_BYTES
        return self._base(linear) + shape.adapter * self.rank * self.optimised + OUTSIDE + self.beside

    def _base(self, linear: float) -> float:
        """Of a base that is shared out: this process's part, and what is gathered at a time: layers, and one of both ends."""
        layers, ends = self.shape.linear * linear, self.shape.embedding * self.width
        if self.shares == 1:
            return layers + ends
        scales = self.shape.linear * SCALE_BYTES if self.nf4 else 0
        ends = ends if self.shape.tied else ends / self.shares + ends / 2
        return (layers - scales) / self.shares + scales + GATHERED * layers / self.shape.layers + ends


def choose(
    needs: Needs, batch: int, memory_gib: float, *, rows: int | None, recompute: bool | None, dequantise: bool | None, attention: bool = False
) -> Plan:
    """The fastest plan that fits; what is not None is taken as it is, and where all is given nothing is doubted.

    attention: its results can be kept where layers are recomputed, in as many layers as there is room for. Raises InputError where
    nothing fits.
    """
    sizes = [rows] if rows else [size for size in range(1, batch + 1) if batch % size == 0]
    again = [recompute] if recompute is not None else [False, True]
    once = [dequantise] if dequantise is not None else [True, False]
    plans = [Plan(*each) for each in product(sizes, again, once if needs.nf4 else [False])]
    room = USABLE * memory_gib * GIB
    fitting = plans if len(plans) == 1 else [plan for plan in plans if needs.bytes(plan) <= room]
    if fitting:
        plan = min(fitting, key=lambda plan: _time(plan, needs, batch))
        if not (attention and plan.recompute):
            return plan
        layers = max(room - needs.bytes(plan), 0) / needs.attention_bytes(plan.rows)
        return replace(plan, attention=int(min(layers, needs.shape.layers)))
    least = min(plans, key=needs.bytes)
    raise InputError(
        f"params.yaml: packed: {least.rows} rows of {needs.longest} tokens take about {needs.bytes(least) / GIB:.1f} GiB and there are "
        f"{room / GIB:.1f}: make max_length smaller, or set fewer rows and recompute to true"
    )


def _time(plan: Plan, needs: Needs, batch: int) -> float:
    """Of an update, in tokens that could be trained meanwhile: forward, backward (twice as long), and what is done again."""
    tokens = plan.rows * needs.longest
    arithmetic = (4 / 3 if plan.recompute else 1) * (tokens + HALF_SPEED)
    passes = (3 if plan.recompute else 2) if needs.nf4 and not plan.dequantise else 0
    return batch / plan.rows * (arithmetic + passes * REMAKING)

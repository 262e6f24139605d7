"""Log-probabilities of completions, without padding, without the logits of more than a thousand tokens at a time, and of what rows begin
with in common once."""

from functools import cache

from stages.training.packing import CHUNK


def packed_logprobs(decoder, head, input_ids, attention_mask, wanted, lenders, lent, *, temperature: float, longest: int, compiled: bool):
    """Of the wanted tokens of padded rows, in nats, and the entropy of what each was drawn from: (rows, length) each, 0 for all others.

    decoder: a model without its head; head: (vocabulary, hidden). input_ids; attention_mask, 0 where there is no token; wanted, of
    tokens that have one before them: (rows, length) each. lenders, lent, (rows,): a row's first `lent` tokens are, in the same columns,
    those of the row `lenders`, which lends none that it has borrowed; they are computed once. The gradient goes through the
    log-probabilities alone.
    """
    import torch
    from torch.nn.functional import pad

    there = attention_mask.bool()
    positions = attention_mask.cumsum(1) - 1
    borrowed = there & (positions < lent[:, None])
    computed = there & ~borrowed
    places = _places(computed)
    places = torch.where(borrowed, places[lenders], places)
    among_all = _places(there)
    again = _borrowers(borrowed, among_all, lenders)
    wanted = wanted & there
    before, tokens = pad(places[:, :-1], (1, 0))[wanted], input_ids[wanted]  # here, for to count them the host waits for all before
    hidden = decoder(
        input_ids=input_ids[computed][None],
        position_ids=positions[computed][None],
        cu_seq_lens_q=_bounds(computed),
        cu_seq_lens_k=_bounds(there),
        max_length_q=longest,
        max_length_k=longest,
        lent=(places[there], among_all[computed], again[:, computed]) if len(again) else None,
        use_cache=False,
    ).last_hidden_state[0]
    logprobs, entropies = _in_pieces().apply(hidden, head, before, tokens, temperature, compiled)
    padded = torch.zeros((2, *wanted.shape), device=hidden.device)
    return padded[0].masked_scatter(wanted, logprobs), padded[1].masked_scatter(wanted, entropies)


def _places(tokens):
    """Of each token of a mask, (rows, length), how many come before it."""
    return (tokens.flatten().cumsum(0) - 1).view_as(tokens)


def _borrowers(borrowed, places, lenders):
    """Where the tokens are, among all, that stand for a token in rows that borrowed it: (borrowers, rows, length), -1 where no more have.

    borrowed: a mask of such tokens; places, of each among all: (rows, length) both. As many borrowers as any row has.
    """
    import torch

    rows = borrowed.any(1).nonzero()[:, 0]
    order = (lenders[rows][:, None] == lenders[rows]).tril(-1).sum(1)  # of a row among those that borrow from the same one
    again = places.new_full((int(order.max()) + 1 if len(rows) else 0, *places.shape), -1)
    again[order, lenders[rows]] = torch.where(borrowed, places, -1)[rows]
    return again


def _bounds(tokens):
    """Where rows begin and the last ends, (rows + 1), of a mask of tokens."""
    from torch.nn.functional import pad

    return pad(tokens.sum(1).cumsum(0), (1, 0)).int()


@cache
def _in_pieces():
    """An autograd function, where torch is there to be derived from."""
    import torch

    class Pieces(torch.autograd.Function):
        """A piece's logits are made, measured and dropped; and once more in the backward pass, when the gradient of each token is known."""

        @staticmethod
        def forward(ctx, hidden, head, places, tokens, temperature, compiled):
            measure = _compiled_measure() if compiled else _measure
            head = head.to(hidden.dtype)
            found = torch.empty(2, len(places), device=hidden.device)
            for start in range(0, len(places), CHUNK):
                part = slice(start, start + CHUNK)
                found[:, part] = measure(hidden[places[part]] @ head.t(), tokens[part], temperature)
            ctx.save_for_backward(hidden, head, places, tokens)
            ctx.temperature, ctx.compiled = temperature, compiled
            logprobs, entropies = found[0].clone(), found[1].clone()
            ctx.mark_non_differentiable(entropies)
            return logprobs, entropies

        @staticmethod
        def backward(ctx, by_logprobs, _):
            hidden, head, places, tokens = ctx.saved_tensors
            slope = _compiled_slope() if ctx.compiled else _slope
            whole = torch.zeros_like(hidden)
            for start in range(0, len(places), CHUNK):
                part = slice(start, start + CHUNK)
                by_logits = slope(hidden[places[part]] @ head.t(), tokens[part], by_logprobs[part], ctx.temperature)
                whole.index_add_(0, places[part], by_logits @ head)  # rows that begin alike have the token before in common
            return whole, None, None, None, None, None

    return Pieces


def _measure(logits, tokens, temperature):
    """Log-probabilities of the tokens and entropies, (2, tokens), in nats."""
    import torch

    wide = logits.float() / temperature
    normaliser = wide.logsumexp(-1, keepdim=True)
    logprobs = (wide.gather(1, tokens[:, None]) - normaliser)[:, 0]
    entropies = normaliser[:, 0] - ((wide - normaliser).exp() * wide).sum(-1)
    return torch.stack([logprobs, entropies])


def _slope(logits, tokens, by_logprobs, temperature):
    """The gradient by the logits, from that by the tokens' log-probabilities."""
    import torch

    chances = (logits.float() / temperature).softmax(-1)
    here = torch.arange(logits.shape[-1], device=tokens.device) == tokens[:, None]
    return ((here.float() - chances) * (by_logprobs[:, None] / temperature)).to(logits.dtype)


@cache
def _compiled_measure():
    import torch

    return torch.compile(_measure, dynamic=True)


@cache
def _compiled_slope():
    import torch

    return torch.compile(_slope, dynamic=True)

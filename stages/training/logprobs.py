"""Log-probabilities of completions, without padding, and without the logits of more than a thousand tokens at a time."""

from functools import cache

from stages.training.packing import CHUNK


def packed_logprobs(decoder, head, input_ids, attention_mask, kept: int, *, temperature: float, longest: int, compiled: bool):
    """Of each of the last `kept` tokens of padded rows, in nats, and the entropy of what it was drawn from: (rows, kept) each.

    decoder: a model without its head; head: (vocabulary, hidden). input_ids, attention_mask: (rows, length); where the mask is 0 there is
    no token, and 0 in what is returned. The gradient goes through the log-probabilities alone.
    """
    import torch

    there = attention_mask.bool()
    lengths = attention_mask.sum(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    hidden = decoder(
        input_ids=input_ids[there][None],
        position_ids=(attention_mask.cumsum(1) - 1)[there][None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
    ).last_hidden_state[0]
    drawn = there[:, -kept:]
    places = (there.flatten().cumsum(0) - 1).view_as(there)[:, -kept:][drawn]  # of the drawn tokens among those that are there
    logprobs, entropies = _in_pieces().apply(hidden, head, places - 1, input_ids[:, -kept:][drawn], temperature, compiled)
    padded = torch.zeros((2, *drawn.shape), device=hidden.device)
    return padded[0].masked_scatter(drawn, logprobs), padded[1].masked_scatter(drawn, entropies)


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
                whole[places[part]] = by_logits @ head
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

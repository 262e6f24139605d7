"""bitsandbytes' optimisers without a host that the GPU waits for: an adapter has hundreds of tensors, each of which they update alone."""

from itertools import chain

BLOCK = 256  # numbers whose moments in 8 bits have a scale in common
IN_8_BITS_FROM = 4096  # numbers of a weight: smaller ones have moments in 32 bits


def keep_up(trainer) -> None:
    """Has the trainer's optimiser, if it is bitsandbytes' and on a GPU, update the whole adapter at once and wait for nothing.

    In fp16 it updates tensor by tensor: losses are scaled there, and what takes the scale out again looks at each tensor's gradient.
    """
    import torch

    create = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = create(*args)
        if torch.cuda.is_available() and type(optimizer).__module__.startswith("bitsandbytes."):
            _never_wait(optimizer)
            if not trainer.args.fp16:
                in_one_piece(optimizer)
        return optimizer

    trainer.create_optimizer = create_optimizer


def _never_wait(optimizer) -> None:
    """bitsandbytes would wait for the GPU after each tensor.

    What it keeps of them may lie in memory that host and GPU have in common: before that is read for a checkpoint, all is waited for.
    """
    import torch
    from bitsandbytes.optim import optimizer as theirs

    theirs.sync_gpu = lambda tensor: None
    optimizer.register_state_dict_pre_hook(lambda _: torch.cuda.synchronize())


def in_one_piece(optimizer) -> None:
    """Makes one tensor of each group's weights, which become views of it: the same updates, for their blocks stay the same.

    Leaves an optimiser alone with a weight that does not consist of whole blocks, or is small. To be called before its first step.
    """
    import torch

    groups = [group for group in optimizer.param_groups if group["params"]]
    sizes = [[weight.numel() for weight in group["params"]] for group in groups]
    if any(size % BLOCK or size < IN_8_BITS_FROM for size in chain(*sizes)):
        return
    pieces = []
    for group, parts in zip(groups, sizes, strict=True):
        weights = group["params"]
        whole = torch.nn.Parameter(torch.cat([weight.data.flatten() for weight in weights]))
        for weight, part in zip(weights, whole.data.split(parts), strict=True):
            weight.data = part.view_as(weight)
        group["params"] = [whole]
        pieces.append((whole, weights))

    def gather(*_) -> None:
        for whole, weights in pieces:
            whole.grad = torch.cat([weight.grad.flatten() for weight in weights])

    def drop(*_) -> None:
        for whole, _ in pieces:
            whole.grad = None

    optimizer.register_step_pre_hook(gather)
    optimizer.register_step_post_hook(drop)

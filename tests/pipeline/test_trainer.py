"""What the trainers share, on a model of three modules and on three weights."""

import copy

import pytest
import torch

from stages.training.optimizers import in_one_piece
from stages.training.trainer import walk_once


def mixed() -> torch.nn.Module:
    """Its parts are in evaluation and itself is not, as a loaded base is below a new adapter."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Dropout(0.5)))
    model[0].eval()
    model[1].eval()
    return model


def test_a_model_walked_once_is_in_each_mode_with_all_its_modules():
    model = mixed()
    walk_once(model)
    for set_mode, expected in ((model.train, True), (model.train, True), (model.eval, False), (model.train, True), (model.eval, False)):
        assert set_mode() is model
        assert {module.training for module in model.modules()} == {expected}


def test_a_model_walked_once_has_the_parameters_it_had_and_clears_their_gradients():
    model = mixed()
    before = list(map(id, model.parameters()))
    walk_once(model)
    assert list(map(id, model.parameters())) == list(map(id, model.parameters())) == before
    model(torch.ones(1, 3)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    model.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


WEIGHTS = (1, 4, 2)  # rows of each


def made(joined: bool, numbers: int = 4096) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Weights and bitsandbytes' AdamW in 8 bits for them, in two groups."""
    from bitsandbytes.optim import AdamW8bit

    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(rows, numbers, generator=draw)) for rows in WEIGHTS]
    optimizer = AdamW8bit([{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}], lr=0.01)
    if joined:
        in_one_piece(optimizer)
    return weights, optimizer


def update(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    """An update with gradients drawn from each seed, their norm clipped."""
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_weights_in_one_piece_are_updated_to_the_same_bits():
    (apart, one_by_one), (joined, at_once) = made(joined=False), made(joined=True)
    update(apart, one_by_one, 1, 2, 3)
    update(joined, at_once, 1, 2, 3)
    assert all(map(torch.equal, apart, joined))
    before, after = (list(optimizer.state.values()) for optimizer in (one_by_one, at_once))
    assert len(before) == 3 and len(after) == 2
    for moment in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(torch.cat([before[place][moment].flatten() for place in (0, 1)]), after[0][moment].flatten())


def test_weights_in_one_piece_go_on_from_what_was_saved():
    whole, optimizer = made(joined=True)
    update(whole, optimizer, 1, 2)
    weights, state = [weight.detach().clone() for weight in whole], copy.deepcopy(optimizer.state_dict())
    update(whole, optimizer, 3, 4)
    resumed, optimizer = made(joined=True)
    for weight, saved in zip(resumed, weights, strict=True):
        weight.data.copy_(saved)
    optimizer.load_state_dict(state)
    update(resumed, optimizer, 3, 4)
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("numbers", [4100, 2048])
def test_weights_of_broken_blocks_or_too_small_for_8_bits_stay_apart(numbers):
    weights, optimizer = made(joined=True, numbers=numbers)
    update(weights, optimizer, 1)
    assert len(optimizer.state) == 3

"""What the trainers share, on a model of three modules."""

import torch

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

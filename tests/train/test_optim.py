"""The optimizers: groups, and Adam by the age of each link against torch's and by hand."""

import pytest
import torch
from torch import nn

from llm_cht.train.optim import AgedAdam, OptimizerSettings, build_optimizer


def steps(optimizer, parameter, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_ages_that_are_never_reset_give_torchs_adam(name):
    models = [nn.Linear(5, 7) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, link_age in zip(models, (False, True), strict=True):
        settings = OptimizerSettings(name=name, lr=0.1, weight_decay=0.2, link_age=link_age)
        optimizer = build_optimizer(model, settings)
        generator = torch.Generator().manual_seed(3)
        for _ in range(40):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_new_link_steps_by_the_learning_rate_and_not_by_three_times_it():
    moved = {}
    for link_age in (False, True):
        layer = nn.Linear(1, 1, bias=False)
        optimizer = build_optimizer(layer, OptimizerSettings(lr=0.01, link_age=link_age))
        steps(optimizer, layer.weight, 1000)
        for key, value in optimizer.state[layer.weight].items():
            if key != "step":
                value.zero_()  # what a topology update does to a new link
        before = layer.weight.item()
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        moved[link_age] = (before - layer.weight.item()) / 0.01
    assert moved[True] == pytest.approx(1, rel=1e-3)
    assert moved[False] == pytest.approx(0.1 / 0.001**0.5 * (1 - 0.999**1001) ** 0.5, rel=1e-3)  # nearly 3.16


def test_zeros_stay_zero():
    parameter = nn.Parameter(torch.tensor([[0.0, 1.0]]))
    optimizer = AgedAdam([{"params": [parameter], "weight_decay": 0.1}], 0.1, (0.9, 0.999), 1e-8, True)
    for _ in range(5):
        parameter.grad = torch.tensor([[0.0, 0.3]])
        optimizer.step()
    assert parameter[0, 0] == 0
    assert parameter[0, 1] != 1

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parl_core.models.unchanged import change_of, params_of, parts


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def _own_forward(network: nn.Sequential) -> None:
    network[0].forward = lambda inputs: inputs


def _own_linear_hook(kind: str) -> Callable[[nn.Sequential], None]:
    return lambda network: getattr(network[0], f"register_{kind}")(lambda *_: None)


def test_a_module_as_it_was_made_is_unchanged() -> None:
    assert change_of(_network(), "the network") is None


def test_an_attribute_that_hides_no_method_is_no_change() -> None:
    network = _network()
    network.callback = print
    assert change_of(network, "the network") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_own_linear_hook("forward_hook"), "hooks are registered on '0'"),
        (_own_linear_hook("forward_pre_hook"), "hooks are registered on '0'"),
        (_own_linear_hook("full_backward_hook"), "hooks are registered on '0'"),
        (_own_linear_hook("full_backward_pre_hook"), "hooks are registered on '0'"),
        (_own_forward, "'0' has a forward of its own"),
        (lambda network: network.register_forward_hook(lambda *_: None), "hooks are registered on the network"),
    ],
)
def test_a_change_is_told_with_its_place(change: Callable[[nn.Sequential], None], says: str) -> None:
    network = _network()
    change(network)
    assert change_of(network, "the network") == says


def test_a_hook_on_all_modules_is_a_change_of_each() -> None:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None: ...

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        assert change_of(_network(), "the network") == "hooks are registered on all modules"
    finally:
        handle.remove()
    assert change_of(_network(), "the network") is None


def test_parts_and_parameters_come_in_the_order_of_torch() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Linear(3, 3, bias=False), nn.Identity())
    network.register_module("absent", None)
    assert parts(network) == list(network.modules())
    assert all(a is b for a, b in zip(params_of(network), network.parameters(), strict=True))


def test_a_method_replaced_by_another_name_of_the_class_is_a_change() -> None:
    """Of any class, also one that is seen for the first time after others were looked at."""

    class Scaled(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale(inputs)

        def scale(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    network = nn.Sequential(Scaled())
    assert change_of(network, "the network") is None
    network[0].scale = torch.sin
    assert change_of(network, "the network") == "'0' has a scale of its own"

"""Adam's native step against torch.optim.Adam, and against the formula."""

import copy
import math
import warnings

import pytest
import torch

from parl_core.ops import backend
from parl_core.optim import adam_step

native = pytest.importorskip("parl_core._native")


def make(dtype: torch.dtype, **options: object) -> tuple[list[torch.nn.Parameter], torch.optim.Adam]:
    """Tensors of many sizes, two groups with different rates, and one parameter that never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (1,), (63,), (40, 25), (300, 300), (0,), (5,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    groups = [{"params": params[:3], "lr": 1e-2}, {"params": params[3:], "lr": 3e-4}]
    return params, torch.optim.Adam(groups, fused=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_are_those_of_torch_also_in_turns(isa, dtype, tolerance, threads):
    mine, adam = make(dtype)
    theirs, reference = make(dtype)
    generator = torch.Generator().manual_seed(1)
    torch.set_num_threads(threads)
    try:
        for step in range(12):
            for one, other in zip(mine[:-1], theirs[:-1], strict=True):
                one.grad = torch.randn(one.shape, generator=generator, dtype=dtype) * 10.0 ** (step % 5 - 3)
                other.grad = one.grad.clone()
            adam.step() if step % 4 == 3 else adam_step(adam, backend="cpp")
            reference.step()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert adam.state[one].keys() == reference.state[other].keys()
        for name, value in reference.state[other].items():
            torch.testing.assert_close(adam.state[one][name], value, rtol=tolerance, atol=tolerance)
    assert mine[-1].grad is None and not adam.state[mine[-1]]


def test_two_steps_by_hand():
    """Gradients 1 and −3 with β = (½, ¾): m = ½, −5/4; v = ¼, 39/16."""
    param = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    adam = torch.optim.Adam([param], lr=0.1, betas=(0.5, 0.75), eps=0.01, fused=True)
    expected = 2.0
    for gradient, m, v, t in [(1.0, 0.5, 0.25, 1), (-3.0, -1.25, 39 / 16, 2)]:
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        adam_step(adam, backend="cpp")
        expected -= 0.1 * (m / (1 - 0.5**t)) / (math.sqrt(v / (1 - 0.75**t)) + 0.01)
        assert param.item() == pytest.approx(expected, rel=1e-14)


def test_unusual_optimisers_step_by_torch():
    for options in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}):
        mine, adam = make(torch.float32, **options)
        theirs, reference = make(torch.float32, **options)
        for one, other in zip(mine, theirs, strict=True):
            one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
        adam_step(adam)
        reference.step()
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_the_backend_context_decides(monkeypatch):
    _, adam = make(torch.float32)
    monkeypatch.setattr(native, "adam", lambda *_: pytest.fail("the native step was taken"))
    with backend("reference"):
        adam_step(adam)


def test_the_state_can_be_saved_and_loaded():
    params, adam = make(torch.float32)
    for param in params:
        param.grad = torch.ones_like(param)
    adam_step(adam)
    copied = copy.deepcopy(params)
    other = torch.optim.Adam([{"params": copied[:3]}, {"params": copied[3:]}], fused=True)
    other.load_state_dict(copy.deepcopy(adam.state_dict()))
    for param in copied:
        param.grad = torch.ones_like(param)
    adam_step(adam)
    other.step()
    for one, two in zip(params, copied, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_native_module_checks_its_tensors():
    def tensors(**changes):
        good = {name: [torch.zeros(4)] for name in ("params", "gradients", "exp_avgs", "exp_avg_sqs")}
        return good | {"steps": [torch.zeros(())]} | changes

    numbers = (0.1, 0.9, 0.999, 1e-8)
    native.adam(*tensors().values(), *numbers, 1)
    for changes, error, message in [
        ({"gradients": []}, ValueError, "gradients must have as many tensors as params, 1, got 0"),
        ({"gradients": [torch.zeros(5)]}, ValueError, "gradients must have 4 elements, got 5"),
        ({"exp_avgs": [torch.zeros(4).double()]}, TypeError, "exp_avgs must be of dtype float32, got float64"),
        ({"exp_avg_sqs": [torch.zeros(8)[::2]]}, ValueError, "exp_avg_sqs must be contiguous"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, TypeError, "steps must be of dtype float32, got int64"),
        ({"params": [torch.zeros(4).long()]}, TypeError, "params must be float32 or float64, got int64"),
    ]:
        with pytest.raises(error, match=message):
            native.adam(*tensors(**changes).values(), *numbers, 1)
    with pytest.raises(ValueError, match="num_threads must be 1 to 1024, got 0"):
        native.adam(*tensors().values(), *numbers, 0)


def test_hooks_schedulers_and_subclasses_keep_their_say():
    def gradients(params):
        for param in params:
            param.grad = torch.ones_like(param)

    params, adam = make(torch.float32)
    gradients(params)
    calls = []
    adam.register_step_pre_hook(lambda *_: calls.append("before"))
    adam.register_step_post_hook(lambda *_: calls.append("after"))
    adam_step(adam)
    assert calls == ["before", "after"]

    params, adam = make(torch.float32)
    gradients(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
    adam_step(adam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        scheduler.step()

    class Counting(torch.optim.Adam):
        steps = 0

        def step(self, closure=None):
            type(self).steps += 1
            return super().step(closure)

    adam_step(Counting(params, fused=True))
    assert Counting.steps == 1


def test_groups_and_states_that_the_native_step_does_not_know():
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Adam, got SGD"):
        adam_step(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1))
    params = [torch.nn.Parameter(torch.zeros(2))]
    adam = torch.optim.Adam([{"params": []}, {"params": params}], lr=0.1)
    params[0].grad = torch.ones(2)
    torch.set_default_dtype(torch.float64)
    try:
        adam.step()
        adam_step(adam)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(params[0].detach(), torch.full((2,), -0.2))

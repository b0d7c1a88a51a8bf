"""The table of backends on a GPU: what it must hold, and that ops choose by it."""

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode

from parl_core.ops import choice, registry, support_table
from parl_core.ops.choice import Rule, format_table, gpu_order, parse, rules

TABLE = {"toy": (Rule("cuda", "short", 100, "NVIDIA H200", "2026-11-21"), Rule("triton", "long"))}


@pytest.fixture
def toy_rules(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: TABLE)


def test_orders_by_size(toy_rules):
    assert gpu_order("toy", 100) == ("cuda", "triton", "graph", "reference")
    assert gpu_order("toy", 101) == ("triton", "cuda", "graph", "reference")
    assert gpu_order("another", 5) == ("cuda", "triton", "graph", "reference")


def test_a_rule_for_the_reference_leaves_nothing_before_it(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: {"toy": (Rule("reference", "fastest"),)})
    assert gpu_order("toy", 1)[0] == "reference"


def test_tables_are_read_as_they_are_written():
    assert parse(format_table(TABLE)) == TABLE


@pytest.mark.parametrize(
    "listed",
    [
        [],
        [{"backend": "cuda", "because": "", "up_to": 5}],
        [{"backend": "cuda", "because": "", "up_to": 5}, {"backend": "cuda", "because": "", "up_to": 5}],
        [{"backend": "cuda", "because": "", "up_to": None}, {"backend": "triton", "because": "", "up_to": 5}],
    ],
)
def test_rules_must_cover_all_sizes_in_order(listed):
    with pytest.raises(ValueError, match="growing up_to, null at the end"):
        parse(json.dumps({"toy": listed}))


def test_rules_must_name_a_backend_for_gpus():
    with pytest.raises(ValueError, match="must name one of cuda, triton, graph, reference, got cpp"):
        parse(json.dumps({"toy": [{"backend": "cpp", "because": ""}]}))


def test_grounds_tell_what_was_measured_from_what_was_thought():
    measured, thought = TABLE["toy"]
    assert measured.grounds == "NVIDIA H200, 2026-11-21: short"
    assert thought.grounds == "not measured: long"


def test_the_committed_table_names_ops_and_grounds():
    assert rules().keys() >= {"gae, td_lambda", "vtrace", "f_divergence", "linear_recurrence"}
    for listed in rules().values():
        assert all(rule.because and (rule.device is None) == (rule.date is None) for rule in listed)


def test_ops_on_a_gpu_choose_by_size_and_move_on(toy_rules, monkeypatch):
    monkeypatch.setattr(registry, "_OPS", {})
    for name in ("cuda", "triton"):
        monkeypatch.setitem(registry._WHY_UNAVAILABLE, name, lambda: None)
    op = registry.Op("toy", lambda x: x)
    for name in ("cuda", "triton"):
        op.register(name, lambda: lambda x: x, device_types=frozenset({"cuda"}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        short, long = (torch.empty(count, device="cuda") for count in (100, 101))
    assert (op.select(short, None), op.select(long, None)) == ("cuda", "triton")
    monkeypatch.setitem(registry._WHY_UNAVAILABLE, "triton", lambda: "it was taken away")
    assert op.select(long, None) == "cuda"
    assert op.select(long, "reference") == "reference"


def test_tensors_on_the_cpu_never_look_at_the_table(monkeypatch):
    monkeypatch.setattr(choice, "rules", lambda: 1 / 0)
    op = next(iter(registry._OPS.values()))
    assert op.select(torch.ones(3), None) in support_table()[op.name]

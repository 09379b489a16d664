"""The speeds that `chatlearn plan` simulates with."""

import math
from dataclasses import replace

import pytest

from chatlearn.cli.sync_report import choose_speeds
from chatlearn.errors import ConfigError
from chatlearn.sync.simulate import CPU_HOST, H100_CLUSTER

UNSTATED = {"node_gb_s": None, "network_gb_s": None, "latency_us": None}


@pytest.mark.parametrize(("is_gpu", "base"), [(True, H100_CLUSTER), (False, CPU_HOST)])
def test_what_is_not_stated_is_that_of_a_usual_machine(is_gpu, base):
    assert choose_speeds(is_gpu=is_gpu, **UNSTATED) == base
    assert choose_speeds(is_gpu=is_gpu, **{**UNSTATED, "node_gb_s": 5.0}) == replace(base, node=5e9)


def test_what_is_stated_counts():
    found = choose_speeds(is_gpu=True, node_gb_s=200.0, network_gb_s=12.5, latency_us=0.0)
    assert (found.node, found.network, found.latency_s) == (2e11, 1.25e10, 0.0)
    assert choose_speeds(is_gpu=True, **{**UNSTATED, "latency_us": 30.0}).latency_s == 3e-5


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["node_gb_s", "network_gb_s"])
def test_a_speed_that_is_none_is_refused(name, value):
    option = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{option} is {value:g}: give a speed above 0"):
        choose_speeds(is_gpu=True, **{**UNSTATED, name: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_latency_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=rf"--latency-us is {value:g}: give 0 or more"):
        choose_speeds(is_gpu=False, **{**UNSTATED, "latency_us": value})

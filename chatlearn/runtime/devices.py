"""What devices there are: this machine's, those of a running cluster, or assumed ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chatlearn.errors import ConfigError, PlacementError
from chatlearn.runtime.placement import DeviceInventory

if TYPE_CHECKING:
    from chatlearn.config import Config

__all__ = ["assume_inventory", "discover_inventory"]

_USUAL_DEVICES = 8


def discover_inventory(config: Config, *, may_join: bool = True) -> DeviceInventory:
    """The devices of the cluster that will be used (`RAY_ADDRESS`), else of this machine.

    Args:
        config: the configuration.
        may_join: join the cluster to count; otherwise this machine counts.

    Raises:
        PlacementError: `devices_per_node` asks for more GPUs than a node has.
    """
    asked = config.runtime.devices_per_node
    num_nodes, gpus = 1, _count_gpus()
    if may_join and config.runtime.backend == "ray" and os.environ.get("RAY_ADDRESS"):
        from chatlearn.runtime.ray_cluster import count_cluster_devices, join_cluster

        join_cluster(config)
        num_nodes, gpus = count_cluster_devices()
    if gpus and asked != "auto" and int(asked) > gpus:
        raise PlacementError(
            f"runtime.devices_per_node asks for {asked} devices, but a node has {gpus} GPUs: lower "
            "it, or leave it at auto"
        )
    if gpus:
        return DeviceInventory(num_nodes, gpus if asked == "auto" else int(asked), "gpu")
    return DeviceInventory(num_nodes, None if asked == "auto" else int(asked), "logical")


def assume_inventory(config: Config, num_devices: int) -> DeviceInventory:
    """As if there were `num_devices` GPUs, in nodes of `runtime.devices_per_node` (auto: 8).

    Raises:
        ConfigError: they are fewer than one, or leave a node incomplete.
    """
    if num_devices < 1:
        raise ConfigError(f"expected at least 1 assumed device, got {num_devices}")
    asked = config.runtime.devices_per_node
    per_node = min(num_devices, _USUAL_DEVICES if asked == "auto" else int(asked))
    if num_devices % per_node:
        raise ConfigError(
            f"{num_devices} assumed devices do not fill nodes of {per_node}: assume a multiple of "
            f"{per_node}, or set runtime.devices_per_node"
        )
    return DeviceInventory(num_devices // per_node, per_node, "gpu")


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0

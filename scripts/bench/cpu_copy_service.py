"""A copy service for Megatron-Core's re-sharder on CPUs: its own ones need CUDA."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.resharding.copy_services.base import CopyService

__all__ = ["CpuCopyService"]


class CpuCopyService(CopyService):
    """Sends and receives over the default gloo group; what stays on a rank is copied there.

    Attributes:
        num_bytes: that came from other ranks so far.
    """

    def __init__(self) -> None:
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._receives: list[tuple[torch.Tensor, int]] = []
        self.num_bytes = 0

    def submit_send(self, src_tensor: torch.Tensor, dest_rank: int) -> None:
        """Note a tensor to send."""
        self._sends.append((src_tensor, dest_rank))

    def submit_recv(self, dest_tensor: torch.Tensor, src_rank: int) -> None:
        """Note a tensor to receive into."""
        self._receives.append((dest_tensor, src_rank))

    def run(self) -> None:
        """Send and receive all of them at once; messages of one pair keep their order."""
        rank = dist.get_rank()
        given = [tensor for tensor, peer in self._sends if peer == rank]
        taken = [tensor for tensor, peer in self._receives if peer == rank]
        for source, destination in zip(given, taken, strict=True):
            destination.copy_(source)
        sends = [(tensor, peer) for tensor, peer in self._sends if peer != rank]
        receives = [(tensor, peer) for tensor, peer in self._receives if peer != rank]
        works: list[Any] = [dist.isend(tensor, peer) for tensor, peer in sends]
        works += [dist.irecv(tensor, peer) for tensor, peer in receives]
        for work in works:
            work.wait()
        self.num_bytes += sum(tensor.nbytes for tensor, _ in receives)
        self._sends.clear()
        self._receives.clear()

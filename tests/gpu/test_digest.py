"""Digests on a GPU are those of the CPU, one by one and many at once."""

import pytest
import torch

from chatlearn.sync.digest import compute_digests

pytestmark = pytest.mark.gpu
SHAPES = [(512, 1024), (95, 11008), (7,), (), (0, 3), (3000, 1025), (512, 1024), (2049, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_digests_are_those_of_the_cpu(cuda_world, dtype):
    source = torch.Generator().manual_seed(0)
    blocks = [torch.randint(0, 99, shape, generator=source).to(dtype) for shape in SHAPES]
    blocks.append(blocks[0].t())
    wanted = compute_digests(blocks)
    there = [block.to(cuda_world) for block in blocks]
    assert compute_digests(there) == wanted
    assert compute_digests(there, is_stacked=False) == wanted

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("contract", "integration")]


@pytest.fixture
def cuda_world(tmp_path):
    """A world of one rank with NCCL."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    store = dist.FileStore(str(tmp_path / "world"), 1)
    torch.cuda.set_device(0)
    timeout = timedelta(seconds=60)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timeout
    )
    yield torch.device("cuda", 0)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

"""Kernels say what plain torch says: on a GPU, or on the CPU by Triton's interpreter.

`make test-kernels` runs these and whole models on the CPU. Without Triton they are skipped.
"""

import os

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from megatron_adapters import fused, vocab_parallel  # noqa: E402
from megatron_adapters.kernels import decoding, elementwise  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=source).to(DEVICE, dtype)


def check(found, wanted, dtype=torch.float32):
    torch.testing.assert_close(
        found.float(), wanted.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.fixture
def plain(monkeypatch):
    """From now on no kernel is used where there is a choice."""

    def leave_kernels():
        for module in (fused, vocab_parallel):
            monkeypatch.setattr(module, "can_run_kernels", lambda _: False)

    return leave_kernels


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [1, 37, 1500])
def test_gated_activation_and_its_gradient(plain, dtype, columns):
    wide, slope = draw(5, 1, 2 * columns, dtype=dtype), draw(5, 1, columns, dtype=dtype)
    found, found_slope = elementwise.gate(wide), elementwise.gate_backward(wide, slope)
    plain()
    leaf = wide.float().requires_grad_()
    wanted = fused.swiglu(leaf)
    wanted.backward(slope.float())
    check(found, wanted, dtype)
    check(found_slope, leaf.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "angles"), [(16, 8), (20, 6), (64, 32), (18, 9)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotary_positions_of_heads_that_lie_apart(plain, dtype, size, angles, sign):
    heads = draw(7, 2, 5, size, dtype=dtype)[:, :, :3]
    cos, sin = draw(7, 1, 1, angles), draw(7, 1, 1, angles, seed=1)
    found = elementwise.turn(heads, cos, sin, sign)
    assert found.is_contiguous()
    plain()
    wanted = fused._turn(heads, cos, sin, sign, is_interleaved=False)
    check(found, wanted, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_change", [True, False])
@pytest.mark.parametrize("size", [24, 2048])
def test_sum_and_norm(dtype, has_change, size):
    hidden, change = draw(4, size, dtype=dtype), draw(4, size, dtype=dtype, seed=1)
    weight = draw(size, dtype=dtype)
    total = hidden + change if has_change else hidden.clone()
    normed = decoding.add_and_normalize(hidden, change if has_change else None, weight, 1e-5)
    check(hidden, total, dtype)
    check(normed, functional.rms_norm(total.float(), (size,), weight.float(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "size", "angles"), [(1, 16, 8), (3, 20, 8), (4, 64, 32)])
def test_queries_turn_and_keys_and_values_enter_the_cache(plain, dtype, heads, size, angles):
    rows, groups, length = 5, 2, 40
    keys, values = (draw(rows + 2, groups, length, size, dtype=dtype, seed=s) for s in (0, 1))
    mixed = draw(rows, groups, heads + 2, size, dtype=dtype)
    cos, sin = (draw(length, angles, dtype=dtype, seed=s) for s in (2, 3))
    positions = torch.tensor([0, 39, 7, 8, 0], device=DEVICE)
    slots = torch.tensor([0, 1, 2, 3, 6], device=DEVICE)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    found = decoding.turn_and_write(mixed, (cos, sin), positions, slots, keys, values)
    plain()
    turned = fused._turn(
        mixed[:, :, :-1].reshape(rows, 1, -1, size),
        cos[positions][:, None, None],
        sin[positions][:, None, None],
        1.0,
        is_interleaved=False,
    ).view(rows, groups, heads + 1, size)
    wanted_keys[slots, :, positions] = turned[:, :, -1]
    wanted_values[slots, :, positions] = mixed[:, :, -1]
    check(found, turned[:, :, :-1], dtype)
    check(keys, wanted_keys, dtype)
    assert torch.equal(values, wanted_values)


def test_without_rotary_positions_queries_and_keys_stay(plain):
    mixed, keys, values = draw(2, 1, 3, 20), draw(4, 1, 8, 20), draw(4, 1, 8, 20)
    places = torch.tensor([3, 5], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    found = decoding.turn_and_write(mixed, None, *places, keys, values)
    assert torch.equal(found, mixed[:, :, :1])
    assert torch.equal(keys[places[1], :, places[0]], mixed[:, :, 1])


# The interpreter multiplies bits of bfloat16 as if they were integers.
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else TOLERANCE)
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("window", [None, 0, 10, 300])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 20), (4, 64)])
def test_rows_attend_to_what_they_see(monkeypatch, dtype, programs, window, heads, size):
    monkeypatch.setattr(decoding, "_PROGRAMS", programs)
    groups, length = 2, 1100
    last = [0, 5, 63, 64, 500, 1099]
    keys, values = (draw(len(last) + 2, groups, length, size, dtype=dtype, seed=s) for s in (0, 1))
    query = draw(len(last), groups, heads, size, dtype=dtype)
    wanted = []
    for row, position in enumerate(last):
        seen = slice(0 if window is None else max(0, position - window), position + 1)
        key, value = (t[row, :, seen].double() for t in (keys, values))
        shares = (0.3 * query[row].double() @ key.transpose(1, 2)).softmax(-1)
        wanted.append((shares @ value).flatten())
    found = decoding.attend_rows(
        query,
        keys,
        values,
        torch.tensor(last, device=DEVICE),
        0.3,
        longest=length,
        window=window,
    )
    check(found, torch.stack(wanted), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("scale", "has_entropy"), [(1.0, True), (0.7, True), (1.3, False)])
@pytest.mark.parametrize("columns", [40, 5000])
def test_scores_of_tokens_and_their_gradient(plain, lone_group, dtype, scale, has_entropy, columns):
    logits = 6.0 * draw(9, 1, columns, dtype=dtype)
    source = torch.Generator().manual_seed(0)
    targets = torch.randint(0, columns - 7, (9, 1), generator=source).to(DEVICE)
    factors = draw(9, 1), draw(9, 1, seed=1)

    def score():
        leaf = logits.clone().requires_grad_()
        found = vocab_parallel.score_tokens(
            leaf,
            targets,
            vocab_size=columns - 7,
            temperature=1.0 / scale,
            group=lone_group,
            has_entropy=has_entropy,
        )
        total = (found.logprobs * factors[0]).sum()
        if has_entropy:
            total = total + (found.entropy * factors[1]).sum()
        total.backward()
        parts = [found.logprobs, leaf.grad, *([found.entropy] if has_entropy else [])]
        return [part.detach() for part in parts]

    by_kernel = score()
    plain()
    for found, wanted in zip(by_kernel, score(), strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
        )


@pytest.fixture(scope="module")
def lone_group():
    """A process group of one rank."""
    import torch.distributed as dist

    is_new = not dist.is_initialized()
    if is_new:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if is_new:
        dist.destroy_process_group()


def test_groups_that_fit_on_no_gpu_are_left_to_torch():
    assert decoding.can_attend_rows(4, 128, torch.bfloat16)
    assert decoding.can_attend_rows(16, 256, torch.float32)
    assert not decoding.can_attend_rows(128, 256, torch.bfloat16)

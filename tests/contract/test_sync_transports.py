"""What every transport of a weight sync does the same way."""

from __future__ import annotations

import pytest
import sync_cases as cases
import torch

from chatlearn.errors import SyncError, WorkerError
from chatlearn.runtime.local_backend import LocalBackend
from chatlearn.sync.transport import spoil_weights

# By transport: the setting, and the nodes that trainer's ranks and samplers claim to be on. Those
# named after it need a GPU, which both models share.
PLACES = {
    "local": ("auto", {}),
    "shared_memory": ("auto", {"trainer": "aa", "sampler": "aaa"}),
    "channel": ("collective", {"trainer": "aa", "sampler": "aaa"}),
    "mixed": ("auto", {"trainer": "aa", "sampler": "abb"}),
    "cuda_local": ("auto", {}),
    "cuda_ipc": ("auto", {"trainer": "a", "sampler": "a"}),
}
ON_GPU = ("cuda_local", "cuda_ipc")
MODES = ("in_place", "double")
QUICK = {("local", "in_place"), ("local", "double"), ("shared_memory", "in_place")}
QUICK |= {("channel", "double"), ("mixed", "in_place")}
# Where a failure costs a second: each transport and each mode quickly, all pairs in time.
PAIRS = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.long)
    for name in PLACES
    if name not in ON_GPU
    for mode in MODES
]
PAIRS += [pytest.param(name, mode, marks=pytest.mark.gpu) for name in ON_GPU for mode in MODES]
MIB = 1 << 20
MOST_GROWTH = {"files": 0, "threads": 0, "children": 0, "bytes": 5 * MIB, "device bytes": 5 * MIB}


@pytest.fixture(scope="module")
def sync_workers(_ray_head, tmp_path_factory):
    with cases.pair_on_ray(
        _ray_head, tmp_path_factory.mktemp("workers"), num_sources=2, num_destinations=3
    ) as pair:
        yield pair


@pytest.fixture(scope="module")
def gpu_workers(_ray_head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_workers")
    with cases.pair_on_ray(_ray_head, folder, num_sources=1, num_destinations=1, gpus=1) as pair:
        yield pair


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu if name in ON_GPU else ()) for name in PLACES]
)
def transport(request):
    return request.param


@pytest.fixture
def pair(request, tmp_path, transport):
    setting, nodes = PLACES[transport]
    if transport in ON_GPU and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not nodes:
        pair = cases.Pair(LocalBackend(), tmp_path, 1, 1)
        yield pair
        pair.close()
        return
    pair = request.getfixturevalue("gpu_workers" if transport in ON_GPU else "sync_workers")
    pair.transport = setting
    for name, places in nodes.items():
        pair.call(name, cases.blank)
        for index, node in enumerate(places):
            pair.call_one(name, index, cases.set_node, node)
    yield pair


@pytest.mark.parametrize("mode", MODES)
def test_all_kinds_of_weights_arrive_bit_for_bit(pair, transport, mode):
    synchronizer = pair.prepare(mode=mode)
    for version in range(3):
        pair.call("trainer", cases.write, version)
        report = synchronizer.sync(version)
        assert not any(pair.differing(version))
        assert report.num_bytes == synchronizer.plan.num_bytes
    crossing = {"channel": [True] * 3, "mixed": [False, True, True]}
    found = [*pair.call("sampler", cases.has_channel)]
    assert found == crossing.get(transport, [False] * len(found))


def test_a_second_copy_takes_no_more_than_the_weights(pair):
    synchronizer = pair.prepare(mode="double")
    synchronizer.sync(0)
    for served, copied in pair.call("sampler", cases.doubled_bytes):
        assert copied == served


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_became_new_tensors_are_noticed(pair, mode):
    synchronizer = pair.prepare(mode=mode)
    for version in range(6):
        pair.call("trainer", cases.write, version, version % 3 > 0)
        synchronizer.sync(version)
        assert not any(pair.differing(version))


@pytest.mark.parametrize(("transport", "mode"), PAIRS, indirect=["transport"])
def test_frozen_weights_move_once_and_stay_checked(pair, mode):
    pair.call("trainer", cases.freeze)
    synchronizer = pair.prepare(mode=mode, checks="digest")
    trained = [name for name in cases.KINDS if name != "fixed"]
    pair.call("trainer", cases.write, 0)
    assert synchronizer.sync(0).num_bytes == synchronizer.plan.num_bytes
    pair.call("trainer", cases.write, 1, False, trained)
    frozen_bytes = 4 * 4 * 4 * len(pair.groups["sampler"])
    assert synchronizer.sync(1).num_bytes == synchronizer.plan.num_bytes - frozen_bytes
    assert {name for names in pair.differing(1) for name in names} == {"fixed"}
    pair.call_one("sampler", 0, cases.spoil_element, "fixed")
    with pytest.raises(
        WorkerError, match=r"fixed \(local fixed, slice \[0:4, 0:4\]\).* sampler.r0.0"
    ):
        synchronizer.sync(2)
    assert synchronizer.sync(3).num_bytes == synchronizer.plan.num_bytes
    pair.call("trainer", cases.write, 0, False, ["fixed"])
    pair.call("trainer", cases.write, 1, False, trained)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_frozen_or_thawed_later_arrive(pair, mode):
    synchronizer = pair.prepare(mode=mode)
    moved = []
    for version, is_fixed in enumerate([False, True, True, False, False, True]):
        pair.call("trainer", cases.freeze, is_fixed)
        trained = [name for name in cases.KINDS if name != "fixed"]
        # The third version alone is written while the weight is known to be frozen.
        pair.call("trainer", cases.write, version, False, trained if version == 2 else None)
        moved.append(synchronizer.sync(version).num_bytes)
        wrong = {name for names in pair.differing(version) for name in names}
        assert wrong == ({"fixed"} if version == 2 else set())
    whole = synchronizer.plan.num_bytes
    frozen_bytes = 4 * 4 * 4 * len(pair.groups["sampler"])
    assert moved == [whole, whole, whole - frozen_bytes, whole, whole, whole]


def sync_often(synchronizer, count):
    """Every 64th version: what is checked when must not depend on their numbers."""
    for number in range(count):
        synchronizer.sync(64 * number)


@pytest.mark.parametrize(("transport", "mode"), PAIRS, indirect=["transport"])
@pytest.mark.parametrize(("checks", "most"), [("false", 64), ("digest", 1)])
def test_an_element_that_got_lost_is_found_by_name(pair, mode, checks, most):
    last = len(pair.groups["sampler"]) - 1
    pair.call_one("sampler", last, cases.overlap)
    synchronizer = pair.prepare(mode=mode, checks=checks, bucket_bytes=1 << 16)
    pair.call("trainer", cases.write, 0)
    # Where the sampler passes weights on to another one, that one may be the first to find it.
    where = r"flat_[ab] \(local flat_[ab], slice \[0:.* differs on sampler.r\d.0"
    with pytest.raises(WorkerError, match=where) as caught:
        sync_often(synchronizer, most)
    assert caught.value.model_name == "sampler"
    with pytest.raises(WorkerError, match="SyncError: .*trainer -> sampler to version"):
        pair.call_one("sampler", last, cases.serve)
    pair.call_one("sampler", last, cases.blank)
    synchronizer.sync(1000)
    assert not any(pair.differing(0))
    assert pair.call_one("sampler", last, cases.serve) == cases.value_of("scalar", 0).item()


def test_a_full_check_sees_what_happens_after_the_digests(pair, transport):
    synchronizer = pair.prepare(checks="full")
    pair.call("trainer", cases.write, 0)
    synchronizer.sync(0)
    # This sampler's tensors are looked at with the digests and in the second pass; before that
    # while they are copied early (where all workers pull) or come over the channel.
    num_free = 2 if transport in {"shared_memory", "channel"} else 1
    pair.call_one("sampler", 0, cases.set_hook, cases.Slip("flat_b", num_free))
    with pytest.raises(WorkerError, match=r"1 parts differ on sampler.r0.0: flat_b \(local flat_b"):
        synchronizer.sync(1)
    synchronizer.sync(2)
    assert not any(pair.differing(0))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"global_shape": (1201, 40)}, "leave a hole|has the shape|disagree"),
        ({"dtype": "complex64"}, "complex64, which a sync cannot move"),
    ],
)
def test_a_description_that_cannot_be_names_tensor_and_ranks(pair, fields, told):
    pair.call("trainer", cases.tell, "large", fields)
    with pytest.raises(SyncError, match=told) as caught:
        pair.prepare()
    assert "large" in str(caught.value)
    assert "trainer.r0.0" in str(caught.value)


def test_a_description_by_one_rank_alone_names_the_ranks(sync_workers):
    sync_workers.call("trainer", cases.blank)
    sync_workers.call_one("trainer", 1, cases.tell, "halved", {"dtype": "bfloat16"})
    with pytest.raises(
        SyncError, match="halved: its ranks .*trainer.r0.0, trainer.r0.1.* disagree"
    ):
        sync_workers.prepare()


def test_a_dtype_told_wrongly_is_found_in_the_first_sync(pair):
    pair.call("trainer", cases.tell, "halved", {"dtype": "bfloat16"})
    synchronizer = pair.prepare()
    with pytest.raises(WorkerError, match=r"trainer.r0.\d described halved .*has torch.float16"):
        synchronizer.sync(0)


@pytest.mark.parametrize(("model_name", "num_rows"), [("trainer", 1201), ("sampler", 1199)])
def test_a_weight_that_changes_its_shape_is_found_by_name(pair, model_name, num_rows):
    synchronizer = pair.prepare()
    synchronizer.sync(0)
    pair.call_one(model_name, 0, cases.resize, "large", (num_rows, 40))
    with pytest.raises(WorkerError, match=rf"{model_name}.r0.0 .*large .*{num_rows}"):
        synchronizer.sync(1)
    pair.call_one(model_name, 0, cases.resize, "large", (1200, 40))
    pair.call("trainer", cases.write, 2)
    synchronizer.sync(2)
    assert not any(pair.differing(2))


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_are_half_new_are_taken_by_nobody(pair, mode):
    synchronizer = pair.prepare(mode=mode)
    pair.call("trainer", cases.write, 0)
    synchronizer.sync(0)
    pair.call_one("trainer", 0, spoil_weights, "half new")
    with pytest.raises(WorkerError, match=r"trainer.r0.0 was asked for its weights.*: half new;"):
        synchronizer.sync(1)
    pair.call_one("trainer", 0, spoil_weights, "")
    synchronizer.sync(2)
    assert not any(pair.differing(0))


def test_a_source_that_missed_an_update_is_named(sync_workers):
    pair = sync_workers
    for name in pair.groups:
        pair.call(name, cases.blank)
    synchronizer = pair.prepare(mode="double")
    synchronizer.sync(7)
    pair.call_one("trainer", 0, cases.set_version, 3)
    pair.call_one("trainer", 1, cases.set_version, 2)
    with pytest.raises(SyncError, match=r"should have version \d.* but trainer.r0.[01] has [23]:"):
        synchronizer.sync(8)
    pair.call("trainer", cases.set_version, 3)
    pair.call("trainer", cases.write, 1)
    with pytest.raises(SyncError, match=r"version 4 .*trainer.r0.0 has 3, trainer.r0.1 has 3:"):
        synchronizer.sync(8, held=4)
    synchronizer.sync(8, held=3)
    assert not any(pair.differing(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_sync_that_is_closed_leaves_nothing_in_workers(pair, mode):
    synchronizer = pair.prepare(mode=mode)
    synchronizer.sync(0)
    assert all(found for name in pair.groups for found in pair.call(name, cases.kept))
    synchronizer.close()
    assert not any(found for name in pair.groups for found in pair.call(name, cases.kept))
    with pytest.raises(SyncError, match="has not been prepared"):
        synchronizer.sync(1)
    synchronizer.prepare()
    synchronizer.sync(2)


def measure(pair):
    return [found for name in pair.groups for found in pair.call(name, cases.measure)]


def find_growth(before, after):
    """What each rank has more of than before."""
    return [
        (what, old, new)
        for old, new in zip(before, after, strict=True)
        for what, most in MOST_GROWTH.items()
        if new[what] - old[what] > most
    ]


def check_nothing_leaks(pair, work):
    """What a library keeps, such as a thread of its pool, is kept once; a leak comes again."""
    for _ in range(3):
        before = measure(pair)
        work()
        grown = find_growth(before, measure(pair))
        if not grown:
            break
    assert not grown
    assert cases.shared_files([n for name in pair.groups for n in pair.processes(name)]) == []


@pytest.mark.parametrize(
    "transport",
    [
        "shared_memory",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("channel", "mixed")),
        pytest.param("cuda_ipc", marks=pytest.mark.gpu),
    ],
    indirect=True,
)
def test_nothing_leaks_in_seventy_syncs(pair):
    def sync_in_both_modes(count):
        for mode in ("in_place", "double"):
            synchronizer = pair.prepare(mode=mode, bucket_bytes=1 << 14)
            for version in range(count):
                pair.call("trainer", cases.write, version, version % 2 > 0)
                synchronizer.sync(version)

    sync_in_both_modes(3)
    check_nothing_leaks(pair, lambda: sync_in_both_modes(35))


@pytest.mark.parametrize("transport", ["channel"], indirect=True)
def test_nothing_leaks_in_syncs_that_fail(pair):
    synchronizer = pair.prepare(bucket_bytes=1 << 14)

    def fail_often(count):
        for version in range(count):
            pair.call_one("sampler", 0, cases.resize, "large", (1199, 40))
            with pytest.raises(WorkerError, match=r"sampler.r0.0 .*large"):
                synchronizer.sync(version)
            pair.call_one("sampler", 0, cases.resize, "large", (1200, 40))
            synchronizer.sync(version)

    fail_often(1)
    check_nothing_leaks(pair, lambda: fail_often(2))


@pytest.mark.parametrize("transport", ["shared_memory", "mixed"], indirect=True)
def test_without_shared_memory_weights_take_the_channel(pair, transport):
    pair.call("trainer", cases.reserve_all_memory)
    pair.call("sampler", cases.reserve_all_memory)
    synchronizer = pair.prepare()
    for version in range(2):
        pair.call("trainer", cases.write, version)
        synchronizer.sync(version)
        assert not any(pair.differing(version))
    assert pair.call("sampler", cases.has_channel) == [True] * 3

"""The plan of a weight sync, proven on random models: exact, minimal, even, without deadlock."""

import os
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import BYTES, endpoint, halves, models, shard, whole, whole_vector

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box
from chatlearn.sync.plan import check_sides, plan_sync, summarize_plan
from chatlearn.sync.records import LINKS

# `make test-long` tries many more.
EXAMPLES = int(os.environ.get("CHATLEARN_TEST_EXAMPLES", "200"))
NETWORK = LINKS.index("network")


def elements(box):
    starts = zip(box.offset, box.shape, strict=True)
    return set(product(*(range(at, at + length) for at, length in starts)))


def holders_by_element(endpoints):
    found = {}
    for number, each in enumerate(endpoints):
        for piece in each.shards:
            for at in elements(piece.box):
                found.setdefault((piece.key, at), set()).add(number)
    return found


def network_loads(plan):
    loads = Counter()
    for hop in plan.hops:
        if hop.link == NETWORK:
            loads[hop.source] += plan.buckets[hop.bucket].num_bytes
    return loads


@settings(max_examples=EXAMPLES, deadline=None)
@given(models(), st.sampled_from([4, 12, 64, 1 << 20]))
def test_every_destination_element_is_written_once_from_a_rank_that_holds_it(sides, bucket_bytes):
    sources, destinations = sides
    plan = plan_sync(sources, destinations, bucket_bytes)
    holds = {key: set(found) for key, found in holders_by_element(sources).items()}
    written = Counter()
    for hop in plan.hops:
        for piece in plan.buckets[hop.bucket].pieces:
            given_shard = piece.source.shards[plan.groups[piece.source.holders[0]]]
            taken = piece.destination.shards[plan.groups[hop.destination]]
            assert taken in plan.endpoints[hop.destination].shards
            assert elements(piece.box) <= elements(given_shard.box) & elements(taken.box)
            for at in elements(piece.box):
                assert hop.source in holds[piece.source.key, at]
                holds[piece.source.key, at].add(hop.destination)
                written[hop.destination, piece.source.key, at] += 1
    expected = {
        (len(sources) + number, each.key, at)
        for number, destination in enumerate(destinations)
        for each in destination.shards
        for at in elements(each.box)
    }
    assert written == dict.fromkeys(expected, 1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(models(), st.sampled_from([4, 12, 1 << 20]))
def test_the_network_carries_each_element_once_to_each_node_that_lacks_it(sides, bucket_bytes):
    sources, destinations = sides
    plan = plan_sync(sources, destinations, bucket_bytes)
    crossings, sent = Counter(), Counter()
    for hop in plan.hops:
        node = plan.endpoints[hop.destination].node_id
        is_across = plan.endpoints[hop.source].node_id != node
        assert is_across == (hop.link == NETWORK)
        for piece in plan.buckets[hop.bucket].pieces if is_across else ():
            for at in elements(piece.box):
                crossings[node, piece.source.key, at] += 1
                sent[hop.source, node, piece.source.key, at] += 1
    held = holders_by_element(sources)
    needed = {
        (plan.endpoints[number + len(sources)].node_id, *element)
        for element, takers in holders_by_element(destinations).items()
        for number in takers
        if all(sources[holder].node_id != destinations[number].node_id for holder in held[element])
    }
    assert crossings == dict.fromkeys(needed, 1)
    assert not sent or max(sent.values()) == 1


@settings(max_examples=EXAMPLES, deadline=None)
@given(models(), st.sampled_from([4, 12, 1 << 20]))
def test_the_shortest_link_is_taken(sides, bucket_bytes):
    sources, destinations = sides
    plan = plan_sync(sources, destinations, bucket_bytes)

    def link(source, destination):
        if source.node_id != destination.node_id:
            return "network"
        if source.process_id == destination.process_id:
            return "process"
        is_one_device = source.device_id and source.device_id == destination.device_id
        return "device" if is_one_device else "node"

    sizes = Counter(dict.fromkeys(LINKS, 0))
    for hop in plan.hops:
        source, destination = plan.endpoints[hop.source], plan.endpoints[hop.destination]
        bucket = plan.buckets[hop.bucket]
        assert link(source, destination) == LINKS[hop.link]
        sizes[LINKS[hop.link]] += bucket.num_bytes
        if hop.source < len(sources):
            holders = [plan.endpoints[i] for i in bucket.pieces[0].source.holders]
            links = [LINKS.index(link(holder, destination)) for holder in holders]
            assert hop.link == min(links)
    assert plan.bytes_by_link == sizes
    assert plan.num_bytes == sum(sizes.values())


@settings(max_examples=EXAMPLES, deadline=None)
@given(models(max_copies=4), st.sampled_from([4, 12, 64]))
def test_no_bucket_could_go_to_a_holder_that_sends_less_by_more_than_a_bucket(sides, bucket_bytes):
    plan = plan_sync(*sides, bucket_bytes)
    loads = [Counter() for _ in LINKS]
    for hop in plan.hops:
        loads[hop.link][hop.source] += plan.buckets[hop.bucket].num_bytes
    for hop in plan.hops:
        bucket = plan.buckets[hop.bucket]
        if hop.source >= plan.num_sources:
            continue
        busy = {h.source for h in plan.hops if h.bucket == hop.bucket and h.link == NETWORK}
        for holder in bucket.pieces[0].source.holders:
            if hop.link == NETWORK and holder in busy:
                continue
            if hop.link != NETWORK and not is_as_near(plan, holder, hop):
                continue
            ahead = loads[hop.link][hop.source] - loads[hop.link][holder]
            assert ahead <= bucket.num_bytes


def is_as_near(plan, holder, hop):
    one, other, taker = (plan.endpoints[i] for i in (holder, hop.source, hop.destination))
    return one.node_id == taker.node_id and (
        (one.process_id == taker.process_id) == (other.process_id == taker.process_id)
        and (one.device_id == taker.device_id) == (other.device_id == taker.device_id)
    )


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.integers(2, 5), st.integers(1, 12), st.integers(1, 4), st.sampled_from([4, 16]))
def test_loads_of_equal_holders_differ_by_one_bucket_at_most(copies, length, nodes, bucket_bytes):
    sources = [whole_vector("trainer", length, rank=r, node=f"s{r}") for r in range(copies)]
    takers = [whole_vector("policy", length, replica=r, node=f"d{r}") for r in range(nodes)]
    plan = plan_sync(sources, takers, bucket_bytes)
    loads = network_loads(plan)
    spread = [loads[rank] for rank in range(copies)]
    assert max(spread) - min(spread) <= bucket_bytes
    assert plan.bytes_by_link["network"] == nodes * length * 4


@settings(max_examples=EXAMPLES, deadline=None)
@given(models(), st.sampled_from([4, 12, 1 << 20]))
def test_ranks_that_follow_the_order_never_wait_in_a_circle(sides, bucket_bytes):
    plan = plan_sync(*sides, bucket_bytes)
    queues = {}
    for hop in plan.hops:
        queues.setdefault(hop.source, []).append(hop)
        queues.setdefault(hop.destination, []).append(hop)
    left = len(plan.hops)
    # A rendezvous: a hop runs when it is next for both its ends; the strictest reading.
    while left:
        ready = [
            queue[0]
            for rank, queue in queues.items()
            if queue and rank == queue[0].source and queues[queue[0].destination][0] is queue[0]
        ]
        assert ready
        for hop in ready:
            queues[hop.source].remove(hop)
            if hop.destination != hop.source:
                queues[hop.destination].remove(hop)
            left -= 1


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(models(), st.sampled_from([4, 12, 1 << 20]))
def test_a_round_has_one_message_per_sender_and_receiver(sides, bucket_bytes):
    plan = plan_sync(*sides, bucket_bytes)
    for end in ("source", "destination"):
        used = Counter((hop.round, getattr(hop, end)) for hop in plan.hops if hop.link == NETWORK)
        assert not used or max(used.values()) == 1
    assert [hop.round for hop in plan.hops] == sorted(hop.round for hop in plan.hops)


@given(models(), st.sampled_from([4, 12, 64]))
def test_buckets_stay_within_their_size(sides, bucket_bytes):
    sources, destinations = sides
    for bucket in plan_sync(sources, destinations, bucket_bytes).buckets:
        size = sum(piece.box.num_elements * BYTES[bucket.dtype] for piece in bucket.pieces)
        assert bucket.num_bytes == size <= bucket_bytes


@given(models())
def test_the_plan_is_a_function_of_its_arguments(sides):
    first, second = plan_sync(*sides), plan_sync(*sides)
    assert first.hops == second.hops
    boxes = [
        [[piece.box for piece in bucket.pieces] for bucket in p.buckets] for p in (first, second)
    ]
    assert boxes[0] == boxes[1]


def moved(plan):
    return [
        (hop.source, hop.destination, [piece.box for piece in plan.buckets[hop.bucket].pieces])
        for hop in plan.hops
    ]


def test_tensor_halves_are_gathered_into_a_whole():
    plan = plan_sync(halves("trainer"), [whole("policy")])
    assert moved(plan) == [(0, 2, [Box((0, 0), (2, 2))]), (1, 2, [Box((2, 0), (2, 2))])]
    assert plan.bytes_by_link == {"process": 0, "device": 0, "node": 32, "network": 0}


def test_ranks_of_a_far_node_share_what_one_of_them_receives():
    sources = [whole("trainer", 0, node="a")]
    takers = [whole("policy", replica=r, node="b") for r in range(3)]
    plan = plan_sync(sources, takers)
    assert plan.bytes_by_link == {"process": 0, "device": 0, "node": 64, "network": 32}
    assert [(hop.source, LINKS[hop.link]) for hop in plan.hops] == [
        (0, "network"),
        (1, "node"),
        (1, "node"),
    ]


def test_a_box_for_many_nodes_runs_along_a_chain():
    plan = plan_sync(
        [whole("trainer", node="a")], [whole("policy", replica=r, node=f"b{r}") for r in range(3)]
    )
    assert [(hop.round, hop.source, hop.destination) for hop in plan.hops] == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 2, 3),
    ]


def test_buckets_follow_each_other_along_a_chain():
    takers = [whole("policy", replica=r, node=f"b{r}") for r in range(4)]
    plan = plan_sync([whole("trainer", node="a")], takers, bucket_bytes=4)
    assert len(plan.buckets) == 8
    assert plan.num_rounds == 8 + 4 - 1


def test_the_shortest_link_sends():
    sources = [whole("trainer", 0, node="far"), whole("trainer", 1, node="near", process=7)]
    near = whole("policy", node="near", process=8)
    same = whole("policy", replica=1, node="near", process=7)
    far = whole("policy", replica=2, node="other")
    plan = plan_sync(sources, [near, same])
    assert {hop.source for hop in plan.hops} == {1}
    assert plan.bytes_by_link == {"process": 32, "device": 0, "node": 32, "network": 0}
    assert plan_sync(sources, [far]).bytes_by_link["network"] == 32


def test_models_on_one_device_use_it():
    sources = [whole("trainer", rank, device=f"gpu{rank}") for rank in range(2)]
    takers = [whole("policy", replica=r, device=f"gpu{r}") for r in range(2)]
    plan = plan_sync(sources, takers)
    assert [(h.source, h.destination, LINKS[h.link]) for h in plan.hops] == [
        (0, 2, "device"),
        (1, 3, "device"),
    ]


def test_messages_of_all_pairs_take_turns():
    plan = plan_sync(halves("trainer"), [whole("policy")], bucket_bytes=8)
    assert [hop.source for hop in plan.hops] == [0, 1, 0, 1]


def test_a_bucket_holds_one_dtype():
    shards = [
        shard("a", (2,), (0,), (2,)),
        shard("b", (2,), (0,), (2,), dtype="bfloat16"),
        shard("c", (2,), (0,), (2,)),
    ]
    plan = plan_sync([endpoint("trainer", 0, shards)], [endpoint("policy", 0, shards)])
    keys = [[piece.source.key for piece in bucket.pieces] for bucket in plan.buckets]
    assert keys == [["a", "c"], ["b"]]
    assert plan.num_bytes == 4 + 16


@pytest.mark.parametrize(
    ("given_dtype", "taken"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_narrower_dtype_is_on_the_wire(given_dtype, taken):
    source = endpoint("trainer", 0, [shard("w", (4,), (0,), (4,), dtype=given_dtype)])
    other = endpoint("policy", 0, [shard("w", (4,), (0,), (4,), dtype=taken)])
    plan = plan_sync([source], [other])
    assert (plan.num_bytes, plan.buckets[0].dtype) == (8, "bfloat16")


def vector_of(name, dtype, node="n0", replica=0):
    held = shard("w", (4,), (0,), (4,), dtype=dtype)
    return endpoint(name, 0, [held], node=node, replica=replica)


@pytest.mark.parametrize(
    ("given_dtype", "taken"), [("float16", "bfloat16"), ("float8_e4m3fn", "float8_e5m2")]
)
def test_of_equally_wide_dtypes_the_destinations_is_on_the_wire(given_dtype, taken):
    takers = [vector_of("policy", taken, f"n{replica}", replica) for replica in (1, 2)]
    plan = plan_sync([vector_of("trainer", given_dtype)], takers)
    assert {bucket.dtype for bucket in plan.buckets} == {taken}


@pytest.mark.parametrize(
    ("given_dtype", "taken"),
    [("float32", "int8"), ("int64", "float64"), ("int64", "int8"), ("int8", "uint8")]
    + [("bool", "uint8"), ("float32", "bool")],
)
def test_dtypes_of_different_kinds_are_refused_by_name(given_dtype, taken):
    message = rf"w: trainer has the dtype {given_dtype}, policy.r0.0 {taken}: .* give both"
    with pytest.raises(SyncError, match=message):
        plan_sync([vector_of("trainer", given_dtype)], [vector_of("policy", taken)])


def test_frozen_tensors_are_left_out_where_every_holder_says_so():
    shards = [shard(key, (2,), (0,), (2,)) for key in ("a", "b")]
    names = [piece.local_name for piece in shards]
    sources = [
        endpoint("trainer", 0, shards, frozen=names),
        endpoint("trainer", 1, shards, frozen=names[:1]),
    ]
    plan = plan_sync(sources, [endpoint("policy", 0, shards)], skip_frozen=True)
    assert (plan.num_bytes, plan.skipped_keys) == (8, ("a",))
    assert plan_sync(sources, [endpoint("policy", 0, shards)]).skipped_keys == ()


def with_head():
    return endpoint("trainer", 0, [*whole("trainer").shards, shard("head", (2,), (0,), (2,))])


def test_a_tensor_that_the_destination_lacks_is_refused_by_name():
    message = (
        r"policy has no place for head of trainer.r0.0: both models .* left_out_weights of policy"
    )
    with pytest.raises(SyncError, match=message):
        plan_sync([with_head()], [whole("policy")])
    with pytest.raises(SyncError, match=message):
        plan_sync([with_head()], [whole("policy")], left_out=("body", "hea", "*.head"))
    with pytest.raises(SyncError, match=message):
        check_sides([with_head()], [whole("policy")])


def test_patterns_are_given_as_a_tuple():
    with pytest.raises(
        SyncError, match=r"left_out_weights of policy's module is the text 'head\*'"
    ):
        plan_sync([with_head()], [whole("policy")], left_out="head*")


@pytest.mark.parametrize("pattern", ["head", "he*"])
def test_tensors_that_the_destination_does_without_are_named(pattern):
    plan = plan_sync([with_head()], [whole("policy")], left_out=(pattern,))
    check_sides([with_head()], [whole("policy")], left_out=(pattern,))
    assert plan.unused_keys == ("head",)
    assert dict(summarize_plan(plan)) == {
        "buckets": "1",
        "hops": "1 in 1 rounds",
        "bytes moved": "32",
        "  over process": "0",
        "  over device": "0",
        "  over node": "32",
        "  over network": "0",
        "tensors left out": "head",
    }

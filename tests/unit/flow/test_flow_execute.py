"""Running flows over fake workers: every row once, joined by row id."""

import time
from typing import Any

import pytest
from flow_fakes import ONE, FakeBackend, FakeGroup, Tagger, build_run, read_rows

from chatlearn.data.balance import Limits
from chatlearn.data.rows import RowId
from chatlearn.errors import DataError, FlowError, WaitTimeoutError
from chatlearn.flow.call_loop import CallLoop
from chatlearn.flow.trace import ControlDependencies
from chatlearn.parallel.layout import ParallelLayout


def rows_of(module):
    return [row_id for row_ids, _ in module.calls for row_id in row_ids]


def build_chain():
    first, second = Tagger("a"), Tagger("b", "a")
    third: Any = Tagger("c", "b")

    def flow(batch):
        one = first.forward_step(batch)
        two = second.forward_step(one)
        return third.forward_step(two, one, batch)

    return flow, first, second, third


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_replica_counts_and_batch_sizes_that_divide_nothing_keep_every_row(seed, is_deterministic):
    flow, first, second, third = build_chain()
    run, loop, backend, finished = build_run(
        flow,
        {first: (2, ONE), second: (4, ONE), third: (2, ONE)},
        seed=seed,
        batch_sizes={"a": 3, "b": 4},
        is_deterministic=is_deterministic,
    )
    loop.run_until(lambda: run.is_done)
    expected = [RowId(at, 0) for at in range(35)]
    for module in (first, second, third):
        assert sorted(rows_of(module)) == expected
    found = read_rows(backend, finished)
    assert {row_id.prompt: int(row["c"]) for row_id, row in found.items()} == {
        at: 1000 * at + 111 for at in range(35)
    }
    assert third.calls[0][1] == ["a", "b", "x"]
    assert [run.finished_rows(at) for at in range(3)] == [35, 35, 35]


def test_batches_have_the_configured_size_and_a_short_rest():
    flow, first, second, third = build_chain()
    modules = {first: (2, ONE), second: (4, ONE), third: (2, ONE)}
    run, loop, _, _ = build_run(flow, modules, batch_sizes={"a": 3, "b": None})
    loop.run_until(lambda: run.is_done)
    assert sorted(len(ids) for ids, _ in first.calls) == [2] + [3] * 11
    # Without a size each lane gets an even share.
    assert sorted(len(ids) for ids, _ in second.calls) == [8, 9, 9, 9]
    assert sorted(len(ids) for ids, _ in third.calls) == [17, 18]


class Speaker(Tagger):
    """Gives responses of long-tailed lengths to prompts of three tokens."""

    def forward_step(self, data):
        lengths = [1 + 1400 // (1 + int(x) * 7 % 97) for x in data["x"]]
        self.calls.append((self.row_ids, lengths))
        return {
            "prompt_token_ids": [[1, 2, 3]] * len(lengths),
            "response_token_ids": [[5] * length for length in lengths],
        }


def run_scoring(num_policies, num_scorers, **options):
    """Runs a policy of long-tailed responses and what scores them; gives both."""
    policy, scorer = Speaker("policy"), Tagger("scorer")
    run, loop, _, _ = build_run(
        lambda batch: scorer.forward_step(policy.forward_step(batch), batch),
        {policy: (num_policies, ONE), scorer: (num_scorers, ONE)},
        **options,
    )
    loop.run_until(lambda: run.is_done)
    return policy, scorer


def test_scoring_calls_are_even_in_tokens_over_lanes_and_keep_a_prompt_together():
    sharers = frozenset({"scorer"})
    policy, scorer = run_scoring(1, 4, rows=256, samples=2, prompt_sharers=sharers)
    ((row_ids, lengths),) = policy.calls
    tokens = dict(zip(row_ids, lengths, strict=True))
    prompts = [{row.prompt for row in ids} for ids, _ in scorer.calls]
    loads = [
        sum(tokens[row] for row in ids) + 3 * len(own)
        for (ids, _), own in zip(scorer.calls, prompts, strict=True)
    ]
    assert len(loads) == 4
    assert max(loads) < 1.05 * sum(loads) / 4
    assert len({len(ids) for ids, _ in scorer.calls}) > 1
    assert sum(map(len, prompts)) <= 128 + 4


def test_what_arrives_in_parts_is_spread_over_all_lanes_part_by_part():
    _, scorer = run_scoring(2, 2, rows=128)
    assert sorted(rows_of(scorer)) == [RowId(at, 0) for at in range(128)]
    halves = [{row.prompt // 64 for row in ids} for ids, _ in scorer.calls]
    assert sorted(map(sorted, halves)) == [[0], [0], [1], [1]]


def test_deterministic_batches_are_runs_of_row_order_whatever_arrives_first():
    batches = []
    for seed in range(4):
        flow, first, second, third = build_chain()
        modules = {first: (3, ONE), second: (2, ONE), third: (1, ONE)}
        sizes = {"a": 2, "b": 5, "c": 4}
        run, loop, _, _ = build_run(
            flow, modules, seed=seed, batch_sizes=sizes, is_deterministic=True
        )
        loop.run_until(lambda run=run: run.is_done)
        batches.append([sorted(ids for ids, _ in m.calls) for m in (first, second, third)])
    assert batches[0] == batches[1] == batches[2] == batches[3]
    assert batches[0][1][0] == tuple(RowId(at, 0) for at in range(5))


def test_micro_batches_stream_to_the_next_stage_before_the_first_is_done():
    first, second = Tagger("a"), Tagger("b", "a")
    order = []
    run, loop, _, _ = build_run(
        lambda batch: second.forward_step(first.forward_step(batch)),
        {first: (1, ONE), second: (1, ONE)},
        batch_sizes={"a": 5, "b": 5},
        on_stage=lambda record: order.append(record.model_name),
    )
    loop.run_until(lambda: run.is_done)
    assert sorted(order) == ["a"] * 7 + ["b"] * 7
    assert order.index("b") < 6


def test_colocated_models_take_turns_and_others_run_at_the_same_time():
    def most_open(colocation):
        first, second = Tagger("a"), Tagger("b")
        run, loop, backend, _ = build_run(
            lambda batch: (first.forward_step(batch), second.forward_step(batch)),
            {first: (1, ONE), second: (1, ONE)},
            colocation=colocation,
        )
        loop.run_until(lambda: run.is_done)
        return backend.most_open

    assert most_open([("a", "b")]) == 1
    assert most_open([]) == 2


def test_several_returned_values_come_in_order_and_a_row_is_done_once_all_hold_it():
    first, second = Tagger("a"), Tagger("b")
    run, loop, backend, finished = build_run(
        lambda batch: (second.forward_step(batch), first.forward_step(batch)),
        {first: (2, ONE), second: (1, ONE)},
        rows=5,
        batch_sizes={"a": 1, "b": 2},
    )
    loop.run_until(lambda: run.is_done)
    assert len(finished) == 5
    assert set(read_rows(backend, finished, 0)[RowId(0, 0)]) == {"b"}
    assert set(read_rows(backend, finished, 1)[RowId(0, 0)]) == {"a"}


def test_a_model_called_twice_and_by_several_methods():
    module: Any = Tagger("a")

    def flow(batch):
        once = module.forward_step(batch)
        return module.score(batch, once, scale=3)

    run, loop, backend, finished = build_run(flow, {module: (2, ONE)}, batch_sizes={"a": 4})
    loop.run_until(lambda: run.is_done)
    found = read_rows(backend, finished)
    assert [int(found[RowId(at, 0)]["a_score"]) for at in range(35)] == [3 * at for at in range(35)]


def test_control_dependencies_wait_for_every_row():
    first, second, order = Tagger("a"), Tagger("b"), []

    def flow(batch):
        one = first.forward_step(batch)
        with ControlDependencies(one):
            return second.forward_step(batch)

    run, loop, _, _ = build_run(
        flow,
        {first: (2, ONE), second: (2, ONE)},
        batch_sizes={"a": 3, "b": 3},
        on_stage=lambda record: order.append(record.model_name),
    )
    loop.run_until(lambda: run.is_done)
    assert order == ["a"] * 12 + ["b"] * 12


def test_every_rank_of_a_lane_gets_the_same_rows():
    module = Tagger("a")
    layout = ParallelLayout(tp_size=2, pp_size=2)
    run, loop, backend, finished = build_run(
        module.forward_step, {module: (1, layout)}, rows=6, batch_sizes={"a": 2}
    )
    loop.run_until(lambda: run.is_done)
    assert sorted(rows_of(module)) == sorted(4 * [RowId(at, 0) for at in range(6)])
    assert len(read_rows(backend, finished)) == 6


def test_training_cuts_the_batch_over_the_data_parallel_lanes_of_each_trainer():
    one, two, records = Tagger("a"), Tagger("b"), []

    def flow(batch):
        one.train_step(batch)
        two.train_step(batch)

    run, loop, _, _ = build_run(
        flow,
        {one: (1, ParallelLayout(dp_size=2)), two: (1, ParallelLayout(dp_size=3))},
        rows=7,
        train_limits=Limits(rows=2),
        iteration=4,
        on_stage=records.append,
    )
    loop.run_until(lambda: run.is_done)
    shapes = [sorted([len(ids) for ids in parts] for parts, _, _ in m.batches) for m in (one, two)]
    assert shapes == [[[2, 1], [2, 2]], [[1, 1], [1, 1], [2, 1]]]
    for module in (one, two):
        seen = [row_id.prompt for parts, _, _ in module.batches for ids in parts for row_id in ids]
        assert sorted(seen) == list(range(7))
        assert {iteration for _, _, iteration in module.batches} == {4}
    assert {record.report.metrics["loss"] for record in records} == {0.5}


def test_a_lane_without_rows_still_takes_part():
    module = Tagger("a")
    layout = ParallelLayout(dp_size=2)
    run, loop, _, _ = build_run(module.train_step, {module: (1, layout)}, rows=1)
    loop.run_until(lambda: run.is_done)
    assert sorted(len(parts[0]) for parts, _, _ in module.batches) == [0, 1]


def test_no_rows_are_done_at_once():
    flow, first, second, third = build_chain()
    modules = {first: (1, ONE), second: (1, ONE), third: (1, ONE)}
    run, loop, backend, _ = build_run(flow, modules, rows=0)
    loop.run_until(lambda: run.is_done)
    assert backend.most_open == 0


def test_batches_with_different_columns_name_their_producer():
    class Moody(Tagger):
        def forward_step(self, data):
            return {f"y{int(data['x'][0]) % 2}": data["x"]}

    moody, second = Moody("a"), Tagger("b")
    run, loop, _, _ = build_run(
        lambda batch: second.forward_step(moody.forward_step(batch)),
        {moody: (1, ONE), second: (1, ONE)},
        rows=2,
        batch_sizes={"a": 1, "b": 2},
    )
    message = r"rows of a.forward_step#0: batches have different columns: \['y0'\] and \['y1'\]"
    with pytest.raises(DataError, match=message):
        loop.run_until(lambda: run.is_done)


def test_an_output_with_too_few_rows_names_the_call():
    class Short(Tagger):
        def forward_step(self, data):
            return {"y": data["x"][:1]}

    module = Short("a")
    run, loop, _, _ = build_run(module.forward_step, {module: (1, ONE)}, rows=3)
    with pytest.raises(DataError, match=r"a.forward_step: column 'y' .* first axis of 3"):
        loop.run_until(lambda: run.is_done)


def test_a_call_that_outlasts_the_limit_names_stage_and_worker():
    backend, module = FakeBackend(is_stuck=True), Tagger("a")
    loop = CallLoop(backend, stage_timeout_s=0.0)
    calls = FakeGroup(backend, module, 2, ONE).call(lambda context: None)
    loop.submit(calls, lambda: None, "a.forward_step")
    message = r"stage_timeout_s=0: a.forward_step on a.r2.0 for 0 s. Raise the limit"
    with pytest.raises(WaitTimeoutError, match=message):
        loop.run_until(lambda: False)


def test_a_call_that_hangs_is_noticed_while_others_keep_finishing():
    class Busy(FakeBackend):
        def wait_any(self, calls, timeout_s):
            time.sleep(0.01)
            return tuple(call for call in calls if call.worker.model_name == "busy")

    def keep_busy():
        loop.submit(busy.call(lambda context: None), keep_busy, "busy.forward_step")

    backend = Busy()
    busy, hung = (FakeGroup(backend, Tagger(name), 0, ONE) for name in ("busy", "hung"))
    loop = CallLoop(backend, stage_timeout_s=0.1)
    loop.submit(hung.call(lambda context: None), lambda: None, "hung.forward_step")
    keep_busy()
    end_s = time.monotonic() + 5
    with pytest.raises(WaitTimeoutError, match="=0.1: hung.forward_step on hung.r0.0 for 0 s. R"):
        loop.run_until(lambda: time.monotonic() > end_s)


def test_a_loop_with_nothing_to_wait_for_stops():
    with pytest.raises(FlowError, match="no call runs and none can be dispatched"):
        CallLoop(FakeBackend(), 1.0).run_until(lambda: False)


def test_an_interrupt_ends_the_loop():
    class Stop(Exception):  # noqa: N818
        pass

    def interrupt():
        raise Stop

    loop = CallLoop(FakeBackend(), 1.0)
    loop.interrupt = interrupt
    with pytest.raises(Stop):
        loop.run_until(lambda: False)


class Writer(Tagger):
    """Answers row x with 10 * x + 1 tokens."""

    def forward_step(self, data):
        return {"x": data["x"], "response_token_ids": [[0] * (10 * int(x) + 1) for x in data["x"]]}


def test_training_batches_are_balanced_by_the_tokens_that_a_stage_made():
    writer, trainer = Writer("writer"), Tagger("trainer")

    def flow(batch):
        trainer.train_step(writer.forward_step(batch))

    run, loop, _, _ = build_run(
        flow,
        {writer: (2, ONE), trainer: (1, ParallelLayout(dp_size=2))},
        rows=4,
        batch_sizes={"writer": 1},
        train_limits=Limits(tokens=31),
    )
    loop.run_until(lambda: run.is_done)
    # Lanes of 31 + 1 and of 21 + 11 tokens.
    lanes = sorted(
        [[row_id.prompt for row_id in part] for part in parts] for parts, _, _ in trainer.batches
    )
    assert lanes == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize("is_shared", [False, True])
def test_prompts_count_as_often_as_the_model_computes_them(is_shared):
    policy, trainer, scorer = Speaker("policy"), Tagger("trainer"), Tagger("scorer")

    def flow(batch):
        spoken = policy.forward_step(batch)
        scorer.forward_step(spoken, batch)
        trainer.train_step(spoken, batch)

    run, loop, _, _ = build_run(
        flow,
        {policy: (1, ONE), scorer: (4, ONE), trainer: (1, ONE)},
        rows=64,
        samples=8,
        train_limits=Limits(tokens=1500),
        prompt_sharers=frozenset({"scorer", "trainer"} if is_shared else ()),
    )
    loop.run_until(lambda: run.is_done)
    ((row_ids, lengths),) = policy.calls
    tokens = dict(zip(row_ids, lengths, strict=True))
    prompt = 0 if is_shared else 3

    def count(ids):
        shared = 0 if prompt else 3 * len({row.prompt for row in ids})
        return shared + sum(tokens[row] + prompt for row in ids)

    ((parts, _, _),) = trainer.batches
    assert all(count(ids) <= 1500 or len(ids) == 1 for ids in parts)
    together = sum(len(ids) - len({row.prompt for row in ids}) for ids in parts)
    assert together > 40 or not is_shared
    loads = [count(ids) for ids, _ in scorer.calls]
    assert max(loads) < 1.05 * sum(loads) / 4


def test_a_call_takes_all_samples_of_its_prompts_where_the_batch_size_allows():
    sizes = {}
    for batch_size in (2, 3, 4, 7):
        module = Tagger("a")
        run, loop, _, _ = build_run(
            lambda batch, module=module: module.forward_step(batch),
            {module: (1, ONE)},
            rows=9,
            samples=3,
            batch_sizes={"a": batch_size},
        )
        loop.run_until(lambda run=run: run.is_done)
        sizes[batch_size] = [len(row_ids) for row_ids, _ in module.calls]
    assert sizes == {2: [2, 2, 2, 2, 1], 3: [3, 3, 3], 4: [3, 3, 3], 7: [6, 3]}


def test_a_trainer_knows_how_many_updates_its_episode_has():
    once, twice = Tagger("a"), Tagger("b")

    def flow(batch):
        once.train_step(batch)
        twice.train_step(batch)
        twice.train_step(batch)

    run, loop, _, _ = build_run(flow, {once: (1, ONE), twice: (1, ONE)}, rows=2, num_batches=3)
    loop.run_until(lambda: run.is_done)
    assert (once.num_updates, twice.num_updates) == (3, 6)


@pytest.mark.parametrize("is_planned", [False, True])
def test_planning_training_ahead_changes_nothing(is_planned):
    module = Tagger("a")
    run, loop, _, _ = build_run(
        module.train_step,
        {module: (1, ParallelLayout(dp_size=2))},
        rows=5,
        train_limits=Limits(rows=2),
        iteration=2,
    )
    if is_planned:
        run.plan_training()
    loop.run_until(lambda: run.is_done)
    lanes = sorted([[r.prompt for r in part] for part in parts] for parts, _, _ in module.batches)
    assert lanes == [[[0, 1], [2]], [[3], [4]]]

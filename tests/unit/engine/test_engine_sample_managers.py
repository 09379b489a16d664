"""What the built-in sample managers make of an episode."""

import pytest
import torch

from chatlearn.config.schema import AlgorithmConfig, RuntimeConfig
from chatlearn.data.relay import EpisodeRelayBuffer
from chatlearn.data.rows import RowId
from chatlearn.engine.sample_managers import GroupAdvantageManager, PreferencePairManager
from chatlearn.errors import DataError


def episode(*rewards_by_prompt):
    rows = [
        {
            "row_id": RowId(prompt, sample),
            "rewards": torch.tensor(reward),
            "prompt_token_ids": [prompt],
            "response_token_ids": [prompt, sample],
            "ref_logprobs": torch.tensor([-1.0, -float(sample)]),
        }
        for prompt, rewards in enumerate(rewards_by_prompt)
        for sample, reward in enumerate(rewards)
    ]
    return EpisodeRelayBuffer(0, rows)


def test_each_row_gets_its_advantage_within_its_prompt():
    old, new = episode([9.0, 0.0]), episode([1.0, 3.0], [5.0, 5.0])
    rows = GroupAdvantageManager("none")([old, new])
    assert [float(row["advantages"]) for row in rows] == [-1.0, 1.0, 0.0, 0.0]
    assert [row["row_id"] for row in rows] == [row["row_id"] for row in new.buffer]
    assert rows[0]["response_token_ids"] == [0, 0]
    assert "advantages" not in new.buffer[0]


def test_groups_follow_the_prompt_in_whatever_order_rows_come():
    buffer = episode([1.0, 3.0], [0.0, 8.0]).buffer
    shuffled = EpisodeRelayBuffer(0, [buffer[at] for at in (3, 0, 2, 1)])
    rows = GroupAdvantageManager("none")([shuffled])
    assert [float(row["advantages"]) for row in rows] == [4.0, -1.0, -4.0, 1.0]


def test_the_config_chooses_the_normalization_unless_the_program_does():
    runtime = RuntimeConfig(algorithm=AlgorithmConfig(advantage_normalization="leave_one_out"))
    by_config, by_program = GroupAdvantageManager(), GroupAdvantageManager("none")
    by_config.attach(runtime)
    by_program.attach(runtime)
    samples = [episode([0.0, 0.0, 3.0])]
    assert [float(row["advantages"]) for row in by_config(samples)] == [-1.5, -1.5, 3.0]
    assert [float(row["advantages"]) for row in by_program(samples)] == [-1.0, -1.0, 2.0]


def test_group_advantages_need_rewards():
    row = {"row_id": RowId(0, 0), "prompt": "1+1="}
    with pytest.raises(DataError, match="need the column `rewards`; .* gave row_id, prompt"):
        GroupAdvantageManager()([EpisodeRelayBuffer(0, [row])])


def test_a_pair_is_the_best_against_the_worst_sample_of_a_prompt():
    manager = PreferencePairManager()
    pairs = manager([episode([0.5, 2.0, -1.0], [1.0, 1.0])])
    assert len(pairs) == 1
    assert pairs[0]["row_id"] == RowId(0, 1)
    assert pairs[0]["prompt_token_ids"] == [0]
    assert pairs[0]["chosen_token_ids"] == [0, 1]
    assert pairs[0]["rejected_token_ids"] == [0, 2]
    assert float(pairs[0]["chosen_ref_logprobs"]) == -2.0
    assert float(pairs[0]["rejected_ref_logprobs"]) == -3.0
    assert manager.take_metrics() == {"kept_pairs": 0.5}


def test_prompts_that_teach_nothing_at_all_give_no_pair():
    manager = PreferencePairManager()
    assert manager([episode([1.0, 1.0], [0.0])]) == []
    assert manager.take_metrics() == {"kept_pairs": 0.0}


@pytest.mark.parametrize("missing", ["rewards", "ref_logprobs", "response_token_ids"])
def test_a_pair_needs_its_columns(missing):
    rows = [{k: v for k, v in row.items() if k != missing} for row in episode([1.0, 2.0]).buffer]
    with pytest.raises(DataError, match=f"preference pairs need the column `{missing}`; .* gave"):
        PreferencePairManager()([EpisodeRelayBuffer(0, rows)])

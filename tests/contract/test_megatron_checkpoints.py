"""A checkpoint goes on exactly where it was written, in any layout."""

import megatron_cases as cases
import pytest

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
PAIRS = {
    "tp2-to-pp2": ((2, TP2), (2, PP2)),
    "pp2-to-tp2": ((2, PP2), (2, TP2)),
    "dp2-distributed-to-itself": ((2, DISTRIBUTED), (2, DISTRIBUTED)),
    "one-to-one": ((1, {}), (1, {})),
}


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on_exactly(ranks, tmp_path, name):
    """Adam's step counters come back shared, which would train wrong in silence."""
    (size, fields), (new_size, new_fields) = PAIRS[name]
    expected = ranks.run(size, cases.train_and_save, fields, str(tmp_path))[0]
    for iteration, steps in ranks.run(new_size, cases.resume, new_fields, str(tmp_path)):
        assert iteration == 2
        assert steps == [pytest.approx(step, rel=1e-5) for step in expected]


def test_a_critic_starts_from_a_policy_with_a_head_of_zeros(ranks, tmp_path):
    ranks.run(2, cases.train_and_save, TP2, str(tmp_path))
    first, last = ranks.run(2, cases.load_critic, PP2, str(tmp_path))
    assert first == ([], [])
    assert last[0] == [True]
    assert any(value != 1.0 for value in last[1][0])


def test_a_folder_without_a_checkpoint_is_refused(ranks, tmp_path):
    with pytest.raises(AssertionError, match="holds no Megatron checkpoint"):
        ranks.run(1, cases.resume, {}, str(tmp_path))

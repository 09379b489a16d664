"""Keys, kinds and combinations that are refused, and the way back to YAML."""

import pydantic
import pytest
import yaml

from chatlearn.config import Config, dump_config, load_config
from chatlearn.config.chatlearn_keys import UNSUPPORTED
from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.config.schema import ModelConfig, RuntimeConfig, RuntimeEnvConfig
from chatlearn.errors import ConfigError

DENSE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8}


def message_of(content):
    with pytest.raises(ConfigError) as caught:
        load_config(content)
    return str(caught.value)


def model(**keys):
    return {"models": {"policy": keys}}


def test_defaults_need_no_content():
    config = load_config({})
    assert config == Config()
    assert (config.runtime.num_episode, config.runtime.backend) == (1, "ray")


def test_megatron_fields_stand_flat_and_are_told_apart():
    policy = load_config(model(num_gpu=2, hidden_size=64, lr=1e-5, vocab_size=32)).models["policy"]
    assert policy.num_gpu == 2
    assert policy.megatron == {"hidden_size": 64, "lr": 1e-5, "vocab_size": 32}


def test_a_config_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        load_config({}).runtime.seed = 3


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"runtim": {}}, "runtim: unknown key; did you mean 'runtime'?"),
        ({"runtime": {"num_episodes": 1}}, "did you mean 'num_episode'?"),
        ({"runtime": {"algorithm": {"kl_coeff": 1}}}, "did you mean 'kl_coef'?"),
        ({"runtime_env": {"env_var": {}}}, "did you mean 'env_vars'?"),
        (model(hiden_size=8), "models.policy.hiden_size: unknown key; did you mean 'hidden_size'?"),
        (model(generation={"temprature": 1}), "did you mean 'temperature'?"),
        ({"runtime": {"zzz": 1}}, "runtime.zzz: unknown key; known keys: engine, backend"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(content, line):
    assert line in message_of(content)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"rlhf": {}}, "rlhf: known from ChatLearn but unsupported: the section is called runtime"),
        ({"runtime": {"save_interval": 2}}, "unsupported: use save_episode_interval"),
        ({"runtime_env": {"platform": "DLC"}}, "start the cluster with scripts/run_ray_cluster.sh"),
    ],
)
def test_an_unsupported_key_of_chatlearn_is_refused_with_the_remedy(content, line):
    assert line in message_of(content)


def test_no_supported_key_is_listed_as_unsupported():
    flat = {field for fields in MEGATRON_FIELDS.values() for field in fields}
    assert not set(UNSUPPORTED["runtime"]) & set(RuntimeConfig.model_fields)
    assert not set(UNSUPPORTED["runtime_env"]) & set(RuntimeEnvConfig.model_fields)
    assert not set(UNSUPPORTED["models"]) & {*ModelConfig.model_fields, *flat, *MODEL_FIELDS}


def test_every_problem_is_named_at_once():
    text = message_of({"runtime": {"sed": 1, "lora": 2}, **model(hidden_size="wide", num_gpus=1)})
    assert "models.policy.hidden_size: got 'wide' (str), expected int" in text
    assert "did you mean 'seed'?" in text
    assert "did you mean 'num_gpu'?" in text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"runtime": {"backend": "mpi"}}, "backend: got 'mpi' (str), expected 'ray' or 'local'"),
        (
            {"runtime": {"train_micro_batch_size": 0}},
            "runtime.train_micro_batch_size: got 0 (int), expected greater than or equal to 1",
        ),
        ({"runtime": {"devices_per_node": "x"}}, "runtime.devices_per_node: got 'x' (str)"),
        ({"runtime": {"max_restarts": -2}}, "runtime.max_restarts: got -2 (int), expected greater"),
        (model(num_gpu="many"), "models.policy.num_gpu: got 'many' (str)"),
        (model(lr="fast"), "models.policy.lr: got 'fast' (str), expected float"),
        (model(bf16=1), "models.policy.bf16: got 1 (int), expected bool"),
        ({"runtime": 5}, "runtime: got 5 (int)"),
        ({"runtime": {"output_dir": "x" * 1001}}, "output_dir: got 1001 characters, expected 1000"),
        (model(num_layers=20_000), "models.policy.num_layers: got 20000, expected 10000 or less"),
        ({"models": ["policy"]}, "models: got ['policy'] (list)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(content, line):
    assert line in message_of(content)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"num_gpu": 6, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            "num_gpu=6 is no multiple of TP x PP x CP = 2 x 2 x 1 = 4",
        ),
        ({"num_gpu": 0}, "num_gpu and num_cpu are both 0"),
        ({"num_gpu": 1, "num_cpu": 1}, "num_gpu and num_cpu are both set"),
        ({"num_cpu": 3, "cpu_per_process": 2}, "num_cpu=3 a multiple of cpu_per_process=2"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2 needs num_moe_experts"),
        (
            {**DENSE, "tensor_model_parallel_size": 3},
            "num_attention_heads=8 is no multiple of tensor_model_parallel_size=3",
        ),
        ({**DENSE, "hidden_size": 60}, "hidden_size=60 is no multiple of num_attention_heads=8"),
        ({**DENSE, "num_query_groups": 3}, "num_attention_heads=8 is no multiple of num_query_gr"),
        (
            {**DENSE, "pipeline_model_parallel_size": 3},
            "num_layers=4 is no multiple of PP x VPP = 3 x 1",
        ),
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size > 1"),
        ({"fp16": True}, "fp16 is not supported yet: use bf16"),
        (
            {"max_sequence_length": 64, "generation": {"max_new_tokens": 64}},
            "generation.max_new_tokens=64 leaves no room",
        ),
        ({"num_gpu": 200_000}, "a model has at most 100000 ranks"),
        (
            {"tensor_model_parallel_size": 1000, "context_parallel_size": 1000},
            "TP x PP x CP = 1000 x 1 x 1000: a model has at most 100000 ranks",
        ),
        ({"num_device": 2, "num_gpu": 1}, "num_device is the old name of num_gpu, and they differ"),
    ],
)
def test_sizes_of_a_model_that_do_not_add_up_are_refused_with_the_sum(keys, line):
    text = message_of(model(**keys))
    assert "models.policy: " in text
    assert line in text


@pytest.mark.parametrize(
    ("runtime", "line"),
    [
        (
            {"train_global_batch_size": 10, "train_micro_batch_size": 4},
            "train_global_batch_size=10 is no multiple of train_micro_batch_size=4",
        ),
        (
            {
                "sample_per_episode": 4,
                "num_samples_per_prompt": 2,
                "train_global_batch_size": 16,
            },
            "sample_per_episode x num_samples_per_prompt = 4 x 2 = 8",
        ),
        ({"data_path": ["a", "b"], "data_ratio": "1,2,3"}, "data_ratio has 3 numbers for 2 files"),
        (
            {"algorithm": {"old_logprobs": "rollout", "rollout_correction": "truncate"}},
            "with old_logprobs=rollout they are the same",
        ),
        ({"exp_name": "a\nb"}, "exp_name: expected a plain folder name, of printable characters"),
        ({"exp_name": "-rf"}, "exp_name: expected a plain folder name that no command takes for"),
        ({"profile_episode": 1}, "profile_episode=1 needs profile: true"),
        ({"profile": True, "profile_episode": 3}, "profile_episode=3 is more than num_episode=1"),
        ({"colocation": ["policy,polcy"]}, "'polcy' is not one of the models ['policy']"),
        ({"colocation": ["policy", ["policy"]]}, "'policy' is in more than one group"),
    ],
)
def test_a_run_that_does_not_add_up_is_refused_with_the_sum(runtime, line):
    assert line in message_of({"runtime": runtime, **model(num_gpu=1)})


def test_num_device_is_the_old_name_of_num_gpu():
    assert load_config(model(num_device=2)).models["policy"].num_gpu == 2


def test_a_dumped_config_reads_back_to_an_equal_one(tmp_path):
    (tmp_path / "shape.yaml").write_text("hidden_size: 64\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "models: {policy: {model_config_file: shape.yaml, lr: 1e-5, num_gpu: 2}}\n"
        "runtime: {colocation: ['policy'], data_path: a.txt, data_ratio: 3}\n",
        encoding="utf-8",
    )
    config = load_config(tmp_path / "run.yaml")
    elsewhere = tmp_path / "run" / "config.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump_config(config), encoding="utf-8")
    assert load_config(elsewhere) == config
    assert load_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"enable_resume_training": True}, ("auto", None)),
        ({"enable_resume_training": False}, (None, None)),
        ({"enable_resume_training": True, "resume": "runs/x"}, ("runs/x", None)),
        ({"max_data_ckpt_nums": 3}, (None, 3)),
        ({"max_data_ckpt_nums": 3, "save_total_limit": 3}, (None, 3)),
    ],
)
def test_chatlearns_names_of_resuming_are_read(runtime, expected):
    found = load_config({"runtime": runtime}).runtime
    assert (found.resume, found.save_total_limit) == expected


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"enable_resume_training": "yes"}, "enable_resume_training: got 'yes', expected true or"),
        ({"enable_resume_training": False, "resume": "auto"}, "false, but resume is set"),
        ({"max_data_ckpt_nums": 3, "save_total_limit": 2}, "they differ: 3 and 2"),
    ],
)
def test_chatlearns_names_that_contradict_ours_are_refused(runtime, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"runtime": runtime})

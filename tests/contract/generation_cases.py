"""What the ranks of a Megatron world do in the contract tests of generation."""

from __future__ import annotations

import torch
from megatron_cases import build_module, rows_of, score

from chatlearn.data.rows import RowId
from megatron_adapters.decode_graph import DecodeGraphs
from megatron_adapters.generation_program import ModuleProgram
from megatron_adapters.model_building import unwrap

NUM_SAMPLES = 3


def sample_prompts(
    rank,
    fields,
    prompts,
    *,
    through_modules=False,
    is_filled_up=False,
    is_reversed=False,
    **options,
):
    """Tokens and log-probabilities of the samples of each prompt; the kind of the program."""
    module = build_module(rank, "policy", fields, **options)
    if through_modules:
        use_modules(module)
    if is_filled_up:
        runner = module._runner
        runner.graphs = DecodeGraphs(
            runner.program, runner._layer_index, window=runner._window, is_recorded=False
        )
    ids = [RowId(number, sample) for number in range(len(prompts)) for sample in range(NUM_SAMPLES)]
    tokens, logprobs = respond(module, prompts, ids[::-1] if is_reversed else ids)
    if is_reversed:
        tokens, logprobs = tokens[::-1], logprobs[::-1]
    return tokens, logprobs, type(module._runner.program).__name__


def use_modules(module):
    """Generate through Megatron's modules, whatever the model."""
    runner = module._runner
    runner.program = ModuleProgram(unwrap(module.model[0]), runner.max_length)


def respond(module, prompts, ids, seed=7):
    module.row_ids = ids
    data = {"prompt_token_ids": [prompts[row.prompt] for row in ids]}
    found = module._respond(data, 1.0, seed)
    tokens = [row.tolist() for row in found["response_token_ids"]]
    return tokens, [row.tolist() for row in found["rollout_logprobs"]]


def generate_after_change(rank, fields, prompts):
    """Samples before and after the weights are written, as weight sync writes them.

    Returns:
        Tokens before; tokens and log-probabilities after; those of a module built with the new
        weights.
    """
    ids = [RowId(number, 0) for number in range(len(prompts))]
    new = build_module(rank, "policy", fields, seed=11)
    weights = {name: tensor.clone() for name, tensor in new.weight_tensors().items()}
    expected = respond(new, prompts, ids)
    torch.distributed.barrier()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    module = build_module(rank, "policy", fields, seed=7)
    before, _ = respond(module, prompts, ids)
    for name, tensor in module.weight_tensors().items():
        # Sync also moves weights to shared memory.
        tensor.untyped_storage()._share_fd_cpu_()
        with torch.no_grad():
            tensor.copy_(weights[name])
    return before, respond(module, prompts, ids), expected


def score_samples(rank, fields, prompts, tokens):
    """Log-probabilities of `sample_prompts`' tokens by a full forward."""
    repeated = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    return score(rank, fields, rows_of(repeated, tokens))

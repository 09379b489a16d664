# pyright: standard, reportPrivateImportUsage=false
"""The models of a rollout: policy, reference, value, reward."""

from collections.abc import Sequence
from typing import Any

import torch

from chatlearn.errors import ConfigError
from chatlearn.generation.generator import GenerationRequest, GenerationResult, Generator
from chatlearn.generation.sampling import SamplingParams
from megatron_adapters.batches import Rows, check_token_ids, read_rows, read_temperature
from megatron_adapters.modules.base import MegatronModule
from megatron_adapters.modules.text_rows import build_text_dataset
from megatron_adapters.parts import RowParts, split_by_tokens
from megatron_adapters.runner import MegatronRunner
from megatron_adapters.scoring import score_rows, score_tokens_of_rows

__all__ = ["PolicyInference", "PolicyReference", "RewardInference", "ValueInference"]

# Keeps the random numbers of evaluation apart from those of training.
_EVAL_STREAM = 0x5EED
# Tokens of one forward pass without gradients.
_MOST_TOKENS = 8192


class _TextModule(MegatronModule):
    """A module whose data set may be text."""

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Sequence[Any]:
        """Rows with `prompt_token_ids`; see `tokenize_rows`."""
        del is_eval
        return build_text_dataset(self, prompts)


class PolicyInference(_TextModule):
    """Samples a response for each prompt, and reports the tokens' log-probabilities."""

    use_cache = True

    def setup(self) -> None:
        """Build the model and its cache."""
        super().setup()
        self._runner = MegatronRunner(
            self.model,
            self.settings,
            self.groups,
            num_slots=self.module_args.generation.num_slots,
            memory_share=self.module_args.generation.kv_cache_memory_share,
            device=self.device,
        )

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Sample a response for each prompt.

        Adds `response_token_ids`, `rollout_logprobs`, `temperature`, `policy_version` and, with a
        tokenizer, the text `response`.
        """
        options = self.module_args.generation
        return self._respond(data, options.temperature, self.runtime_args.seed)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """As `forward_step`, at `generation.eval_temperature`, with random numbers of its own."""
        options = self.module_args.generation
        given = options.eval_temperature
        seed = self.runtime_args.seed + _EVAL_STREAM
        return self._respond(data, options.temperature if given is None else given, seed)

    def _respond(self, data: dict[str, Any], temperature: float, seed: int) -> dict[str, Any]:
        self.require_columns(data, "prompt_token_ids")
        check_token_ids(data["prompt_token_ids"], self.settings.shape.vocab_size)
        options = self.module_args.generation
        generator = Generator(
            self._runner,
            SamplingParams(temperature, options.top_p, options.top_k),
            self._stop_tokens(),
            options.max_new_tokens or self.settings.shape.max_sequence_length,
            seed,
            prefill_chunk_tokens=options.prefill_chunk_tokens,
            is_deterministic=self.runtime_args.deterministic,
        )
        requests = [
            GenerationRequest(row_id, prompt)
            for row_id, prompt in zip(self.row_ids, data["prompt_token_ids"], strict=True)
        ]
        results = generator.generate(requests)
        output = {**data, **self._columns(results), "temperature": [temperature] * len(results)}
        finished = sum(result.finish_reason == "stop" for result in results)
        self.log_metrics({"finished": finished / max(len(results), 1)})
        return output

    def _columns(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "response_token_ids": [result.token_ids for result in results],
            "rollout_logprobs": [result.logprobs for result in results],
            "policy_version": [self.policy_version] * len(results),
        }
        if self.runtime_args.tokenizer is not None:
            stop = set(self._stop_tokens())
            columns["response"] = [
                self.tokenizer.decode([t for t in r.token_ids.tolist() if t not in stop])
                for r in results
            ]
        return columns

    def _stop_tokens(self) -> tuple[int, ...]:
        own = self.module_args.generation.stop_token_ids
        found = own
        if self.runtime_args.tokenizer is not None:
            found = tuple(dict.fromkeys((*self.tokenizer.stop_ids, *own)))
        vocab_size = self.settings.shape.vocab_size
        strange = [token for token in found if not 0 <= token < vocab_size]
        if strange:
            raise ConfigError(
                f"models.{self.name}.generation.stop_token_ids: {strange} lie outside the "
                f"{vocab_size} tokens of the model"
            )
        return found


class _ScoringModule(_TextModule):
    """A module that scores responses without gradients."""

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """The same as `forward_step`."""
        return self.forward_step(data)

    def cut(self, rows: Rows) -> RowParts:
        """Rows in micro-batches by tokens; a pipeline gets enough to be full."""
        stages = self.layout.pp_size
        return split_by_tokens(
            rows,
            _MOST_TOKENS,
            shares_prompts=self.shares_prompts,
            least_parts=2 * stages if stages > 1 else 1,
        )

    def score(self, rows: Rows, temperature: float = 1.0) -> list[torch.Tensor]:
        """A number for each response token; meaningless off the last stage."""
        cut = self.cut(rows)
        batches = self.pack(cut.parts, temperature=temperature)
        scores = score_tokens_of_rows(self.model, batches, self.groups)
        return cut.restore(scores) if scores else [torch.empty(0)] * len(rows)


class PolicyReference(_ScoringModule):
    """The policy that training stays close to."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Score responses.

        Adds `ref_logprobs` per response token; for preference pairs the sums
        `chosen_ref_logprobs` and `rejected_ref_logprobs`.
        """
        temperature = read_temperature(data)
        if "chosen_token_ids" not in data:
            return {**data, "ref_logprobs": self.score(read_rows(data), temperature)}
        chosen = read_rows(data, response_key="chosen_token_ids")
        rejected = read_rows(data, response_key="rejected_token_ids")
        # Both responses of a pair in turn, so that they share their prompt.
        prompts = [prompt for prompt in chosen.prompts for _ in range(2)]
        pairs = zip(chosen.responses, rejected.responses, strict=True)
        both = Rows(prompts, [response for pair in pairs for response in pair])
        sums = [row.sum() for row in self.score(both, temperature)]
        return {**data, "chosen_ref_logprobs": sums[::2], "rejected_ref_logprobs": sums[1::2]}


class ValueInference(_ScoringModule):
    """The critic's inference twin."""

    head = "scalar"

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `values`: of the state before each response token."""
        return {**data, "values": self.score(read_rows(data))}


class RewardInference(_ScoringModule):
    """A reward model: one number per response, read at its last token."""

    head = "scalar"
    reads_last = True

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `rewards`."""
        rows = read_rows(data)
        cut = self.cut(rows)
        scores = score_rows(self.model, self.pack(cut.parts), self.groups)
        found = torch.stack(cut.restore(scores)) if scores else torch.zeros(len(rows))
        return {**data, "rewards": found}

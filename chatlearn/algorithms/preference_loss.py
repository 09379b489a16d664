"""Losses on preference pairs: DPO and the reward model's."""

import torch
from torch.nn.functional import logsigmoid

__all__ = ["compute_dpo_loss", "compute_pairwise_loss"]


def compute_dpo_loss(
    chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    chosen_ref_logprobs: torch.Tensor,
    rejected_ref_logprobs: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """-log sigmoid(beta * (chosen log-ratio - rejected log-ratio)), per pair.

    Args:
        chosen_logprobs: [pairs] summed over the response, with gradient.
        rejected_logprobs: [pairs], likewise.
        chosen_ref_logprobs: [pairs] of the reference.
        rejected_ref_logprobs: [pairs] of the reference.
        beta: strength of the tie to the reference.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    chosen = chosen_logprobs - chosen_ref_logprobs
    rejected = rejected_logprobs - rejected_ref_logprobs
    return -logsigmoid(beta * (chosen - rejected))


def compute_pairwise_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor
) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), per pair of scores.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (Bradley-Terry).
    """
    return -logsigmoid(chosen_rewards - rejected_rewards)

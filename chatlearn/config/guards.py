"""The configuration of what happens when numbers go wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Action", "GuardsConfig"]

Action = Literal["warn", "skip", "stop"]


def _as_limit(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Limit = Annotated[float | None, Field(gt=0), BeforeValidator(_as_limit)]


class GuardsConfig(BaseModel):
    """Limits of a training step's numbers, and what to do beyond them; see docs/guards.md.

    `warn` logs and goes on, `skip` leaves the update out, `stop` ends the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    not_finite: Action = Field(
        default="stop", description="a loss, gradient or weight that is NaN or infinite"
    )
    kl_limit: Limit = Field(
        default=None, description="most that the mean KL to the reference may be; null: no limit"
    )
    kl_action: Action = Field(default="stop", description="beyond `kl_limit`")
    update_kl_limit: Limit = Field(
        default=None, description="most that the mean KL to the policy before the episode may be"
    )
    update_kl_action: Action = Field(default="skip", description="beyond `update_kl_limit`")
    ratio_gap_limit: Limit = Field(
        default=None, description="most that the mean of |ratio - 1| may be"
    )
    ratio_gap_action: Action = Field(default="skip", description="beyond `ratio_gap_limit`")
    logprob_gap_limit: Limit = Field(
        default=None,
        description="most that the sampler's log-probabilities may differ from the trainer's, mean",
    )
    logprob_gap_action: Action = Field(default="warn", description="beyond `logprob_gap_limit`")
    grad_norm_limit: Limit = Field(
        default=None, description="most that the gradient's norm may be, before clipping"
    )
    grad_norm_action: Action = Field(default="skip", description="beyond `grad_norm_limit`")
    reward_drop_limit: Limit = Field(
        default=None,
        description="most that an episode's mean reward may lie below the best so far",
    )
    reward_drop_action: Action = Field(
        default="stop", description="beyond `reward_drop_limit`; skip: the episode trains nothing"
    )
    dump: bool = Field(
        default=True, description="write what a fault happened on, for `chatlearn replay`"
    )
    max_dumps: Annotated[int, Field(ge=0)] = Field(default=3, description="of one model in one run")

    @property
    def may_skip(self) -> bool:
        """Whether an update may be left out."""
        limited = ("kl", "update_kl", "ratio_gap", "logprob_gap", "grad_norm")
        return self.not_finite == "skip" or any(
            getattr(self, f"{name}_limit") is not None and getattr(self, f"{name}_action") == "skip"
            for name in limited
        )

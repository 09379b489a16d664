"""Multi-latent attention builds without Transformer Engine.

Seen in megatron-core 0.16.1: its module takes Transformer Engine for installed wherever Megatron's
own extension module imports, which it does without it, too; then it asks whether a layer is a
`TELinear`, which is a stand-in, no class.
"""

from typing import Any

from megatron_adapters.patches.guard import expect_source

__all__ = ["apply"]


def apply() -> None:
    """Let the module know."""
    from megatron.core.transformer import multi_latent_attention

    expect_source(
        multi_latent_attention.MultiLatentAttention.__init__,
        "HAVE_TE\n            and isinstance(self.linear_proj, TELinear)",
        "latent_attention",
    )
    linear: Any = multi_latent_attention.TELinear
    if not isinstance(linear, type):
        multi_latent_attention.HAVE_TE = False

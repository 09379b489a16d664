"""What each rank of a Megatron model holds: from its config alone, or from the live model.

Importing this package, or anything in it but `live_description`, loads neither torch nor Megatron.
"""

from megatron_adapters.weights.description import describe_layout, describe_rank

__all__ = ["describe_layout", "describe_rank"]

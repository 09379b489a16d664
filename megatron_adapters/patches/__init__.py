"""What must be changed in Megatron-Core, one file a topic, applied explicitly at worker start."""

from megatron_adapters.patches.apply import apply_patches, import_megatron

__all__ = ["apply_patches", "import_megatron"]

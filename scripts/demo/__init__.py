"""The demo: PPO or GRPO teaches a small Megatron model to add."""

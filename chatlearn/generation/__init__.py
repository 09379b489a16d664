"""Sampling, the batching scheduler and the model-runner contract. Pure torch, no Megatron."""

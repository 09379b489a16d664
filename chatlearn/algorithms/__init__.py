"""Losses, advantages and KL estimates: pure functions of tensors."""

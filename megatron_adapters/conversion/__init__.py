"""Between Hugging Face folders, Megatron checkpoints and adapters, and proof that it is right."""

"""Low-rank adapters on Megatron's linear layers, in the layout of PEFT."""

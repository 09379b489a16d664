"""What is measured: one process each, told by `scripts/bench/rounds.py` when to work."""

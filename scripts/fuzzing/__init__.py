"""Damaged configs and checkpoint files, and what becomes of them."""

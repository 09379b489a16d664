"""Placement, worker groups and the two backends that run them: Ray and in-process."""

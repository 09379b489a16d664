"""Faults on a schedule, for tiny runs."""

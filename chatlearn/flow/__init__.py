"""Tracing, scheduling and running of flows."""

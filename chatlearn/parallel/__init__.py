"""Layouts, sharded-tensor descriptions, process groups and the worker's context."""

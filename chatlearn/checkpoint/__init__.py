"""Checkpoint folders: written aside, made visible by one rename."""

"""Rows with identity, data sets, samplers and the stream of training batches."""

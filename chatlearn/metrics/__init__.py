"""The run folder, metric files, the timeline and the progress display."""

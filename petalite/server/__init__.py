"""Serves a span of blocks: handlers, session table, and the executor, the one place that runs the model."""

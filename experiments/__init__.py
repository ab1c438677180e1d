"""Experiments: each module is a config with presets, the rows of a table, and a call."""

"""Data that comes one segment after another."""

"""Optimisers: the inner ones by name, the outer one, and rates that tune themselves."""

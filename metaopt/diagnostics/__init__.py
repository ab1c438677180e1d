"""Is a meta-gradient right, where does it break, and does a config fit into memory."""

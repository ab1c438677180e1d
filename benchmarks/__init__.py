"""metaopt beside its peers."""

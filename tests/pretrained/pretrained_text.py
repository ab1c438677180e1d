TEXT = "the quick brown fox jumps over the lazy dog, née Zoë; " * 5

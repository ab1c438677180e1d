"""Which inner states are kept, by dynamic programming, and the scan that carries it out."""

"""Which inner states are kept, how and where, and the scan that carries it out."""

"""Sequential computation: decoding."""

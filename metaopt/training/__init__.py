"""The host loop of a training and all that it writes: checkpoints, metrics, run directories."""

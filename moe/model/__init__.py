"""The decoder: attention, positions, norms, blocks. Knows nothing of processes or engines."""

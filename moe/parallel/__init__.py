"""Processes and engines: who computes which part, and how gradients meet."""

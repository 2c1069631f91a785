"""Mixture-of-Experts research code around Phi-3.5-MoE.

Letters that end tensor names give their logical shape, everywhere in this package:

B batch, S sequence, T = B * S tokens, D model width, F expert width, E experts, K experts of a
token, N = T * K routed rows, V vocabulary, H heads, C head width, L layers.
"""

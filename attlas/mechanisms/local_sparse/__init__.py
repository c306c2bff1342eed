"""Attention over some of the pairs: windows, lines, clusters."""

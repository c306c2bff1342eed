"""Mixing without queries and keys: pooling and convolution."""

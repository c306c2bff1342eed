"""Softmax attention and its close variants."""

"""Attention among channels: features attend to one another, tokens are summed over."""

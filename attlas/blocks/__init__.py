"""What stands around a mixer: the attention shell, positions, norms."""

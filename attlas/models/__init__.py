"""Published networks, made of blocks and any mechanism."""

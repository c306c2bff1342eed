"""One file per published family of image networks."""

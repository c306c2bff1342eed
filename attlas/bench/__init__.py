"""Cost, speed, quality, the results store and the report."""

"""What the mechanisms claim, shown in under two minutes each: `python -m examples.NAME`."""

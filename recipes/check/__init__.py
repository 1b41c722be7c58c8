"""Check a run before it starts."""

"""Programs to start from; each runs with one command from a clone."""

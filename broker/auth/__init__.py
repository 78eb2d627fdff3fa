"""One authentication for every door."""

"""What callers and listeners use: `AsyncClient` and `Client`."""

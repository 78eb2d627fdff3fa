"""The pure machine with memory and no I/O: events in, effects out."""

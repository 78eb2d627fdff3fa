"""Real processes and sockets under random trouble: a proxy that spoils links, peers that keep books, and the run."""

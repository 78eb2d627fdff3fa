"""Sockets: frame loop, outbox, writer, handshake, both ends."""

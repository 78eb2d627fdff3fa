"""Signed multipart messages on ZeroMQ: callers and workers on ROUTER sockets, plain subscribers on an XPUB."""

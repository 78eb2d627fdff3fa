"""Pure codecs between bytes and the core's events and messages."""

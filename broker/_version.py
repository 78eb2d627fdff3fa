"""The version, in a file of its own so that building needs no imports."""

VERSION = "0.1.0"

"""Runs a node as a process."""

"""Dialects joined to routes."""

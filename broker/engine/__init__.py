"""Feeds events to the router, performs its effects, keeps one timer."""

"""Metrics and views for operators."""

"""Frozen networks that others learn from."""

"""Losses on the shared model, each with its heads."""

"""Probes of frozen models that need no training."""

"""Plugins for beitctl from outside."""

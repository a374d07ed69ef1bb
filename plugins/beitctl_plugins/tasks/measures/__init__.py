"""Measures of what models say, by their published definitions."""

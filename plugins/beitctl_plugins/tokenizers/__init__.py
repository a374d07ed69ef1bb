"""Text to ids, pixels to ids."""

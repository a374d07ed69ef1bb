"""Text to ids, pixels to ids, and the teachers of image tokenizers."""

"""The Multiway Transformer: its batch plan, blocks, attention and initial weights."""

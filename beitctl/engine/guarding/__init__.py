"""What keeps a run alive, or ends it with a reason: divergence, hangs, signals, memory, unusable data."""

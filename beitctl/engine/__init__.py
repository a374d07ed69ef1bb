"""The one training loop: sharding, optimizer, checkpoints, guards."""

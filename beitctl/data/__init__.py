"""From raw examples to batches: order, masks, pictures, token store."""

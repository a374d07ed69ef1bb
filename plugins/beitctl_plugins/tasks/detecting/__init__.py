"""What detection of objects is made of: network, views, masks and measures."""

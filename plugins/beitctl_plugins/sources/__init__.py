"""Where raw examples come from."""

"""What a run shows: events, the progress line, the HTML page."""

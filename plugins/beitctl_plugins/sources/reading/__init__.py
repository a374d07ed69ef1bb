"""What sources read files with: tables, tars, texts, addresses; no plugin is in here."""

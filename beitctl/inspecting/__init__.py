"""The work behind ``beitctl data``: what lies at a path, a contact sheet of it, and shards made of it."""

"""The stages, tasks, sources and tokenizers that come with beitctl."""

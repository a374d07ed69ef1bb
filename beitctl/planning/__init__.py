"""What a training needs before it runs: work, memory, time, disk, data. ``beitctl plan``."""

"""What ``beitctl doctor`` looks at that takes more than a glance: devices, numerics, speeds, what fits."""

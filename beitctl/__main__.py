"""``python -m beitctl``, which torchrun needs."""

from beitctl.cli import main

main()

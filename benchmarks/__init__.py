"""What things cost, measured: ``python -m benchmarks.NAME``. The last line on stdout is one JSON object."""

"""What the fitting methods do on a real model: `python -m benchmarks.fitting.NAME`."""

"""Fitting detectors: probes, the thresholds they fire above, and how well they tell."""

"""Files of others that are read as detectors."""

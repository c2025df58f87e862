"""What is known of an SAE's features from data: surveys, kept beside the SAE by its hash."""

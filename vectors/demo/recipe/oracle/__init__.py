"""The demo model's oracle: questions about its states with true answers, and its training."""

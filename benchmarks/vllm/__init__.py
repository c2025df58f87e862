"""What steering costs vLLM: two engines side by side, one plain and one with Steer."""

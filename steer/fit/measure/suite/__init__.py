"""Suites: concepts × ways to steer × factors, rated for concept, instruction and fluency."""

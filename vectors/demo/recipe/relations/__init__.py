"""Relational concepts of the demo world: facts, directions, and how they are judged."""

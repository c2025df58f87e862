"""Commands of `steer inspect` that take a model apart, one a file."""

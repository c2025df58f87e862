"""What decides which tokens are meant beside their position and id: texts that were met before
them, and whose message they stand in."""

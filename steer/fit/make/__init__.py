"""From a sentence to a vector that works, with the controls that say how well."""

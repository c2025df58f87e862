"""What the `inspect` field asks for: a lens over the prompt, or read-outs of the tokens."""

"""What it costs on vLLM that requests ask for read-outs."""

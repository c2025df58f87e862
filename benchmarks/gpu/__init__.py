"""Prepared for a host with one GPU and nothing else: kernels, the transformers engine, vLLM."""

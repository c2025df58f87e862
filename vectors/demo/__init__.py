"""The demo chat model: weights in ``model/``, prompts in ``data/``, training in ``recipe/``."""

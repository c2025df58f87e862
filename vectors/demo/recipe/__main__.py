"""``python -m steer_vectors.demo.recipe`` trains the demo model into its folder."""

from .train import main

main()

"""``python -m steer_vectors.demo.recipe`` trains the demo model into its folder."""

from steer_vectors.demo.recipe.training.train import main

main()

"""``python -m steer_vectors.demo.recipe.sae`` trains and labels the demo SAE."""

from steer_vectors.demo.recipe.sae.build import main

main()

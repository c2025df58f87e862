"""``python -m steer_vectors.demo.recipe.oracle`` trains the demo oracle."""

from steer_vectors.demo.recipe.oracle.build import main

main()

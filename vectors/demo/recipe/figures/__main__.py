"""``python -m steer_vectors.demo.recipe.figures`` draws the pictures of the demo."""

from steer_vectors.demo.recipe.figures.figures import main

main()

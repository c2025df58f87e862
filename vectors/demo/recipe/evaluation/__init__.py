"""Checks the shipped demo model against what a finished model meets.

``python -m steer_vectors.demo.recipe.evaluation`` measures everything anew, on prompts that neither
training nor fitting has seen.
"""

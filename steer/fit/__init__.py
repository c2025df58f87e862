"""Fitting vectors from contrastive prompts, and measuring what they do."""

from steer.fit.fitting import fit
from steer.fit.pairs import Pair, PairSet, read_pairs

__all__ = ["Pair", "PairSet", "fit", "read_pairs"]

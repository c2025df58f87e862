"""Sparse autoencoders: one architecture per file, and the directory layout of SAELens."""

from steer.sae.architectures import SUPPORTED, architecture_named
from steer.sae.base import SAE, FeatureReads
from steer.sae.labels import FeatureLabel, FeatureMatch
from steer.sae.saelens import load_directory, save_directory

__all__ = [
    "SAE",
    "SUPPORTED",
    "FeatureLabel",
    "FeatureMatch",
    "FeatureReads",
    "architecture_named",
    "load_directory",
    "save_directory",
]

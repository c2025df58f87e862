"""Sparse autoencoders: one architecture per file, and the directory layout of SAELens."""

from steer.artefacts.sae.architectures import SUPPORTED, architecture_named
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch
from steer.artefacts.sae.pursuit import Pursuit
from steer.artefacts.sae.reads import FeatureReads
from steer.artefacts.sae.saelens import load_directory, save_directory

__all__ = [
    "SAE",
    "SUPPORTED",
    "FeatureLabel",
    "FeatureMatch",
    "FeatureReads",
    "Pursuit",
    "architecture_named",
    "load_directory",
    "save_directory",
]

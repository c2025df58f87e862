"""The artefact library: the demo model, its contrastive pairs and its vectors."""

from pathlib import Path

LIBRARY: Path = Path(__file__).resolve().parent
"""Folder that holds one sub-folder per model."""

__all__ = ["LIBRARY"]

"""The folders that SAEs are published in, each told by the files it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steer.artefacts.sae import saelens
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes import (
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    sparsify,
)
from steer.formats.saes.saelens_folder import read_saelens

_WEIGHTS = (
    saelens.WEIGHTS,
    sparsify.WEIGHTS,
    llama_scope.WEIGHTS,
    dictionary_learning.WEIGHTS,
    gemma_scope.WEIGHTS,
    gemma_scope.NPZ,
)


@dataclass(frozen=True)
class SAEFolder:
    """One layout: what messages call it, the files that tell it, and its reader."""

    title: str
    files: tuple[str, ...]
    read: Callable[[Path, ImportOptions], SAE]
    needs: tuple[str, ...] = ()
    """Files that a folder of this layout must have, and is told without."""

    def is_one(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in self.files)

    def open(self, folder: Path, options: ImportOptions) -> SAE:
        """Reads it; raises `FileFormatError` for a folder with the weights of several layouts."""
        held = [name for name in _WEIGHTS if (folder / name).is_file()]
        if len(held) > 1:
            raise FileFormatError(
                f"the folder holds the weights of {len(held)} layouts, {', '.join(held)}: leave "
                "out all but one",
                code="unknown_layout",
            )
        return self.read(folder, options)


def _temporal(_folder: Path, _options: ImportOptions) -> SAE:
    raise Unsupported(
        "this is a temporal SAE: its features depend on the tokens before, which a token's own "
        "state does not tell; use an SAE that reads each token by itself",
        code="unsupported_architecture",
    )


def _npz(folder: Path, options: ImportOptions) -> SAE:
    return gemma_scope.read_npz_sae(folder / gemma_scope.NPZ, options)


SAE_FOLDERS = (
    SAEFolder("sparsify", (sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read_sparsify),
    SAEFolder("SAELens", (saelens.CONFIG,), read_saelens, needs=(saelens.WEIGHTS,)),
    SAEFolder(
        "Llama Scope",
        (llama_scope.CONFIG,),
        llama_scope.read_llama_scope,
        needs=(llama_scope.WEIGHTS,),
    ),
    SAEFolder(
        "llamascopium",
        (llamascopium.CONFIG, llamascopium.WEIGHTS),
        llamascopium.read_llamascopium,
    ),
    SAEFolder(
        "dictionary_learning",
        (dictionary_learning.WEIGHTS,),
        dictionary_learning.read_dictionary,
        needs=(dictionary_learning.CONFIG,),
    ),
    SAEFolder(
        "Gemma Scope 2",
        (gemma_scope.WEIGHTS,),
        gemma_scope.read_gemma_scope_2,
        needs=(gemma_scope.CONFIG,),
    ),
    SAEFolder("Gemma Scope", (gemma_scope.NPZ,), _npz),
    SAEFolder("temporal SAE", ("conf.yaml", "latest_ckpt.safetensors"), _temporal),
)
"""In this order: a folder is of the first layout that it has the files of."""

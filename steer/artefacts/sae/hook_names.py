"""Where a hook name of TransformerLens or Hugging Face points in a decoder."""

from __future__ import annotations

import re

from steer.errors import FileFormatError
from steer.model import HookPoint
from steer.spec import Site

_LENS_SITES: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "mlp_act",
    "attn.hook_z": "head_out",
    # TransformerLens 3 renamed a block's ends; what it calls an output of attention or of the MLP
    # lies before the norms that some models have behind them.
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    # Names of ours: TransformerLens has its hook on a norm before some norms' weights.
    "attn_in": "attn_in",
    "mlp_in": "mlp_in",
}
_LENS_NAMES: dict[Site, str] = {site: name for name, site in reversed(_LENS_SITES.items())}
_PART_SITES: dict[str, Site] = {
    "": "resid_post",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "mlp": "mlp_out",
}
_MODULE_SITES: dict[str, Site] = {
    "self_attn.o_proj.input": "head_out",
    "attn.c_proj.input": "head_out",
    "mlp.down_proj.input": "mlp_act",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""What modules of a block read or give; Gemma's MLP has a norm before it and one after it."""
_LENS = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?")
_MODULE = re.compile(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))??(?:\.output)?")


def parse_hook_name(name: str, *, site: Site | None = None) -> HookPoint:
    """The hook point of `blocks.4.hook_resid_post` (TransformerLens) or `model.layers.4`, with or
    without `.mlp`, `.self_attn` and `.output` (Hugging Face).

    `site` is meant by a name that has a layer and is otherwise unknown. Raises
    `FileFormatError` (`unknown_hook_name`).
    """
    lens = _LENS.fullmatch(name)
    if lens and lens[2] in _LENS_SITES:
        return HookPoint(int(lens[1]), _LENS_SITES[lens[2]])
    module = _MODULE.fullmatch(name)
    if module and (module[2] or "") in _PART_SITES:
        return HookPoint(int(module[1]), _PART_SITES[module[2] or ""])
    layer = _LAYER.fullmatch(name)
    if layer and (layer[2] or "") in _MODULE_SITES:
        return HookPoint(int(layer[1]), _MODULE_SITES[layer[2]])
    if layer and site is not None:
        return HookPoint(int(layer[1]), site)
    raise FileFormatError(
        f"the hook name {name!r} is not understood: expected blocks.N. and one of "
        f"{', '.join(_LENS_SITES)}, or model.layers.N; where you know which of our sites it is, "
        "state 'site'",
        code="unknown_hook_name",
    )


def hook_name(point: HookPoint) -> str:
    """TransformerLens' name of `point`."""
    return f"blocks.{point.layer}.{_LENS_NAMES[point.site]}"

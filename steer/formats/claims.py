"""What a file says of its rows beside them: kept, or refused, never lost in silence.

A reader that takes the rows and leaves what stands beside them may do something else than the file
asks for: add what is to be projected out, at another site, at another size. So whatever reader
meets keys of its file that it does not know itself shows them to `check_claims`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from steer.artefacts.sae.hook_names import parse_hook_name
from steer.errors import FileFormatError, quoted
from steer.formats.options import ImportOptions
from steer.spec import SITES, Site

_PARTS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SHOWN = 80

SITE_NAMES: Mapping[str, Site] = {
    **{site: site for site in SITES},
    "resid": "resid_post",
    "residual": "resid_post",
    "residual_stream": "resid_post",
    "residual_stream_post_layer": "resid_post",
    "block_output": "resid_post",
    "block_input": "resid_pre",
    "decoder_block": "resid_post",
    "attention_output": "attn_out",
    "self_attn": "attn_out",
    "attn_out_pre_residual": "attn_out",
    "mlp_output": "mlp_out",
    "mlp": "mlp_out",
    "ffn_out_pre_residual": "mlp_out",
}
"""What others call our sites: words of GLP, pyvene, steering-vectors and TransformerLens."""


def site_named(text: str) -> Site | None:
    """The site that a file's word means, or None for one that is not known."""
    word = text.strip().lower().replace("-", "_").removeprefix("hook_")
    if word in SITE_NAMES:
        return SITE_NAMES[word]
    try:
        return parse_hook_name(text.strip()).site
    except FileFormatError:
        return None


def is_number(value: Any, wanted: float) -> bool:
    """Whether `value`, a number or the text of one, is `wanted`."""
    try:
        return not isinstance(value, bool) and float(value) == wanted
    except (TypeError, ValueError, OverflowError):
        return False


def _is_off(value: Any) -> bool:
    return str(value).strip().lower() in ("", "false", "0", "none", "null", "no", "off")


def _is_addition(value: Any) -> bool:
    return str(value).strip().lower() in ("add", "addition", "additive", "actadd", "steer")


@dataclass(frozen=True)
class _Claim:
    """A kind of key: the words that tell it, the values that change nothing, the option that
    overrules it (a field of `ImportOptions`), and what to do."""

    what: str
    words: frozenset[str]
    is_neutral: Callable[[Any], bool]
    overruled_by: str
    remedy: str


_AS_THEY_ARE = "write the rows as they are to be used, and leave the key out"
_CLAIMS = (
    _Claim(
        "how its rows are applied",
        frozenset({"mode", "operation", "op", "intervention", "algorithm", "action"}),
        _is_addition,
        "",
        "a vector has no such property here: write the file without the key, and name the kind "
        "(add, ablate, project, …) in each request",
    ),
    _Claim(
        "where its rows belong",
        frozenset({"hook", "site", "component", "module", "submodule", "location"}),
        lambda _: False,
        "site",
        f"state 'site' (one of {', '.join(SITES)})",
    ),
    _Claim(
        "how large its rows are meant to be",
        frozenset(
            {"scale", "scales", "scaling", "strength", "coefficient", "coefficients", "coeff"}
            | {"multiplier", "multipliers", "alpha", "alphas", "cap", "caps", "threshold"}
        ),
        lambda value: is_number(value, 1),
        "strength",
        "state 'strength', by which the rows as they stand are multiplied",
    ),
    _Claim(
        "that its rows or states are normalised",
        frozenset({"normalize", "normalise", "normalized", "normalised"})
        | frozenset({"normalization", "normalisation", "preserve", "whiten", "whitened"}),
        _is_off,
        "",
        _AS_THEY_ARE,
    ),
    _Claim(
        "that its rows are one of several parts",
        frozenset({"rank"}),
        lambda value: is_number(value, 1) or _is_off(value),
        "",
        _AS_THEY_ARE,
    ),
    _Claim(
        "that its layers are counted in another way",
        frozenset({"offset"}),
        lambda value: is_number(value, 0) or _is_off(value),
        "layer_offset",
        "state 'layer_offset'",
    ),
    _Claim(
        "that its rows have signs of their own",
        frozenset({"sign", "signs", "negate", "negated", "invert", "inverted", "flip"}),
        lambda value: _is_off(value) or is_number(value, 1),
        "",
        _AS_THEY_ARE,
    ),
)


def check_claims(about: Mapping[str, Any], options: ImportOptions) -> Site | None:
    """The site that `about` names: what a file says beside its rows.

    Raises `FileFormatError` (`unhonoured_metadata`) for what would change the rows' meaning and is
    not honoured, unless the sender overrules it.
    """
    sites: set[Site] = set()
    for key, value in _flat(about):
        words = {part.lower() for part in _PARTS.split(key)} | {key.lower()}
        if "layer_type" in words:  # of steering-vectors
            words.add("site")
        for claim in _CLAIMS:
            if not words & claim.words or value is None or claim.is_neutral(value):
                continue
            site = site_named(str(value)) if claim.overruled_by == "site" else None
            if site is not None:
                sites.add(site)
            elif not _overruled(claim, options):
                raise unhonoured(key, value, f"{claim.what}, which is not understood", claim.remedy)
    if len(sites) > 1 and options.site is None:
        raise unhonoured("site", sorted(sites), "several sites", "state 'site'")
    return next(iter(sites)) if len(sites) == 1 else None


def unhonoured(key: str, value: Any, why: str, remedy: str) -> FileFormatError:
    """The error for what a file says and Steer would not do."""
    return FileFormatError(
        f"the file says {key[:_SHOWN]!r}: {quoted(value, _SHOWN)}, {why}: {remedy}",
        code="unhonoured_metadata",
    )


def _overruled(claim: _Claim, options: ImportOptions) -> bool:
    if claim.overruled_by == "layer_offset" and options.source is not None:
        return True
    return bool(claim.overruled_by) and getattr(options, claim.overruled_by) is not None


def _flat(about: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of one object inside too, as JSON text or not."""
    for key, value in about.items():
        inner = value
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                inner = json.loads(value)
            except (ValueError, RecursionError):
                inner = value
        if isinstance(inner, Mapping):
            for name, one in inner.items():
                plain = isinstance(one, str | int | float) or one is None
                yield f"{key}.{name}", one if plain else reprlib.repr(one)
        else:
            # Lists of a pickle may nest deeper than Python's own repr goes.
            yield str(key), reprlib.repr(value) if isinstance(value, list | tuple) else value

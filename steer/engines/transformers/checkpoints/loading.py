"""A model and its tokenizer, from a folder or a hub name.

What lies there is looked at first, so that what cannot be loaded is refused for what it is: a
single file, an adapter without its base, a quantised model without what runs it, code of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from steer.errors import SteerError, Unsupported


def load_checkpoint(
    location: str | Path, *, dtype: str, device: str, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The model on `device`, and its tokenizer.

    Code that lies beside the weights is run only with `trust_remote_code`. Raises `SteerError`
    (`model_not_loaded`, `unsupported_model`).
    """
    folder = Path(location)
    if folder.is_file():
        raise _not_loaded(
            location,
            "it is a file, and no GGUF: give the folder with config.json, the weights and the "
            "tokenizer",
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_adapter(folder, dtype, device, trust_remote_code)
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 (slow import)

    quantised: str | None = None
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        quantised = _quantisation(config)
        loaded = auto_class(config, trust_remote_code).from_pretrained(
            location, dtype=dtype, trust_remote_code=trust_remote_code
        )
        loaded.to(device)
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except Unsupported:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        if "trust_remote_code" in str(error):
            reason = (
                "it needs the code that lies beside its weights, which runs only with the engine "
                "option trust_remote_code: read that code first"
            )
        elif quantised is not None:
            reason = (
                f"it is quantised ({quantised}), and that does not run here ({reason}): give the "
                "model without quantisation"
            )
        raise _not_loaded(location, reason) from error
    return loaded, tokenizer


def load_tokenizer(location: str | Path) -> Any:
    """The tokenizer alone, without the weights. Raises `SteerError` (`model_not_loaded`)."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow import)

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise _not_loaded(location, f"its tokenizer cannot be read ({reason})") from error


def _not_loaded(location: str | Path, reason: str) -> SteerError:
    return SteerError(
        f"the model {str(location)!r} cannot be loaded: {reason}", code="model_not_loaded"
    )


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The auto class whose models generate text from `config`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: PLC0415

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise Unsupported(
        f"a model of type {config.model_type!r} is not supported: transformers has no class of it "
        "that generates text from tokens",
        code="unsupported_model",
    )


def _quantisation(config: Any) -> str | None:
    """How the weights are quantised, in the words of the configuration; None where they are not."""
    found = getattr(config.get_text_config(), "quantization_config", None) or getattr(
        config, "quantization_config", None
    )
    if found is None:
        return None
    stated = found if isinstance(found, dict) else found.to_dict()
    method = str(stated.get("quant_method", "unknown method"))
    bits = [f"{bits} bit" for bits in (4, 8) if stated.get(f"load_in_{bits}bit")]
    bits += [f"{stated['bits']} bit"] if "bits" in stated else []
    return ", ".join([method, *bits])


def _with_adapter(
    folder: Path, dtype: str, device: str, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """The base model of a PEFT adapter, with the adapter merged into its weights."""
    base = _base_of(folder)
    try:
        from peft import PeftModel  # noqa: PLC0415
    except ImportError as error:
        raise _not_loaded(
            folder,
            f"it is an adapter alone, for the base model {str(base)!r}: install peft, or merge the "
            "adapter into its base and give that folder",
        ) from error
    model, tokenizer = load_checkpoint(
        base, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    try:
        merged: nn.Module = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise _not_loaded(
            folder, f"its adapter does not merge into {str(base)!r} ({error})"
        ) from error
    return merged, tokenizer


def _base_of(folder: Path) -> Path:
    """The folder of the base model that an adapter names."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise _not_loaded(
            folder, "it is an adapter alone, and its adapter_config.json names no base model"
        ) from error
    for base in (Path(str(name)), folder / str(name)):
        if name and base.is_dir():
            return base
    raise _not_loaded(
        folder,
        f"it is an adapter alone, and its base model {name!r} is no folder here: set "
        "base_model_name_or_path in adapter_config.json to the base's folder, or merge the adapter "
        "into its base and give that folder",
    )

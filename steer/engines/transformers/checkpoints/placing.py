"""Where a model is to run and in which numbers, checked before it is loaded."""

from __future__ import annotations

import torch

from steer.errors import SteerError

DTYPES = ("float32", "bfloat16", "float16")


def chosen_device(wanted: str | None) -> str:
    """The device, a GPU if there is any where None is wanted.

    Raises `SteerError` (`invalid_option`) for one that this machine or this torch has not.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SteerError(
            f"the device {wanted!r} cannot be used here ({reason}): name another, or leave it out",
            code="invalid_option",
        ) from None
    if torch.device(wanted).type == "meta":
        raise SteerError(
            "the device 'meta' holds no numbers: name one that computes", code="invalid_option"
        )
    return wanted


def chosen_dtype(wanted: str | None, device: str) -> str:
    """The model's numbers, as transformers spells them: float32 on a CPU, its own on a GPU where
    None is wanted. Raises `SteerError` (`invalid_option`) for others than floating-point ones."""
    if wanted is None:
        return "float32" if torch.device(device).type == "cpu" else "auto"
    plain = wanted.removeprefix("torch.")
    if plain not in (*DTYPES, "auto"):
        raise SteerError(
            f"the dtype {wanted!r} is not one that models run in here: use one of "
            f"{', '.join(DTYPES)}, or auto for the model's own",
            code="invalid_option",
        )
    return plain


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which are several times as fast
    as those of float32; without them they are slower."""
    # torch.cpu.get_capabilities says the same, in newer releases alone.
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )

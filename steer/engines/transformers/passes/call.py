"""What one forward pass was called with: which tokens it is fed, and where they stand.

The truth is the cache and the mask. A token's column is the number of columns that the cache holds
before the pass, plus its place in the pass; its position is the number of tokens of its row before
it, which is the column without the row's padding on the left. Position ids must say the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.transformers.cache import given_cache
from steer.errors import SpecError


@dataclass(frozen=True)
class PassCall:
    """The arguments of a decoder's call (`own`) and of the calls around it, innermost first."""

    own: Mapping[str, Any]
    around: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is fed."""
        for name in ("input_ids", "inputs_embeds"):
            fed = self.own.get(name)
            if isinstance(fed, Tensor) and fed.ndim >= 2:
                self._check_columns(fed.shape[1])
                return fed.shape[0], fed.shape[1]
        raise unclear(
            "the model was called without input_ids or inputs_embeds of the shape [rows, columns]"
        )

    @cached_property
    def cache(self) -> Any:
        """The key-value cache; None where the pass has none, or makes it."""
        return given_cache(self.own)

    @cached_property
    def past(self) -> int:
        """Columns in the cache before the pass."""
        if self.cache is None:
            return 0
        try:
            return int(self.cache.get_seq_length())
        except (AttributeError, TypeError, ValueError) as error:
            raise unclear(
                f"the cache, a {type(self.cache).__name__}, does not say how many tokens each row "
                "holds: use generate or one of transformers' own caches (continuous batching, "
                "generate_batch, is not followed)"
            ) from error

    @property
    def ids(self) -> Tensor | None:
        """The ids `[rows, columns]` of what is fed; None where embeddings are given for them."""
        for given in (self.own, *self.around):
            ids = given.get("input_ids")
            if isinstance(ids, Tensor) and tuple(ids.shape) == self.shape:
                return ids
        return None

    def padding(self, mask: Tensor | None) -> list[int]:
        """Columns of padding on the left of each row, as far as this pass shows them.

        `mask` `[rows, columns of the prompt]` is that of the prompt, where one is known. Raises
        `SpecError` where the mask hides anything else (`padding_side`), and where mask, cache and
        position ids do not say the same (`unclear_positions`).
        """
        rows, columns = self.shape
        end = self.past + columns
        flat = self._flat_mask()
        if mask is not None and flat is None:
            flat = _continued(mask, rows, end)
        ids = self._position_ids
        if flat is not None:
            padding = _left_padding(flat, end)
        elif self._has_mask and ids is not None:
            padding = _from_position_ids(ids, end)
        elif self._has_mask:
            raise unclear(
                "the attention mask is not of the shape [rows, columns] and there are no position "
                "ids: give a mask of two dimensions"
            )
        else:
            padding = [0] * rows
        self.check_position_ids(padding)
        return padding

    def check_position_ids(self, padding: Sequence[int]) -> None:
        """Raises `SpecError` (`unclear_positions`) where they are not those of rows that begin
        after `padding`."""
        ids = self._position_ids
        if ids is None:
            return
        columns = torch.arange(self.past, self.past + ids.shape[1])
        for row, before in enumerate(padding):
            real = columns >= before
            given, column = ids[row, real], columns[real]
            # A model that is given none counts columns, padding and all.
            if torch.equal(given, column - before) or torch.equal(given, column):
                continue
            wrong = int((given != column - before).long().argmax())
            raise unclear(
                f"row {row} of the pass has a token with the position id {int(given[wrong])}, "
                f"where by cache and mask it is at position {int(column[wrong]) - before}: give "
                "every sequence a row of its own, with its cache and its mask, and leave the "
                "position ids to the model"
            )

    def _check_columns(self, columns: int) -> None:
        for given in self.around:
            ids = given.get("input_ids")
            if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] != columns:
                raise unclear(
                    f"the model makes {columns} columns of the {ids.shape[1]} token ids that it "
                    "was given, so that their positions are not known: give the ids of every "
                    "column, or inputs_embeds"
                )

    @property
    def _has_mask(self) -> bool:
        return self.own.get("attention_mask") is not None

    def _flat_mask(self) -> Tensor | None:
        """The innermost mask of two dimensions."""
        for given in (self.own, *self.around):
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask
        return None

    @cached_property
    def _position_ids(self) -> Tensor | None:
        """Position ids `[rows, columns]` that the call gives, those of one row for all; None where
        they count something else than columns (three axes of images)."""
        rows, columns = self.shape
        for name in ("position_ids", "cache_position"):
            given = self.own.get(name)
            if isinstance(given, Tensor) and given.ndim <= 2 and given.shape[-1] == columns:
                return given.reshape(-1, columns).expand(rows, columns).cpu()
        return None


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, however they were given."""
    if not args:
        return dict(kwargs)
    names = inspect.signature(type(module).forward).parameters
    return {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}


def _continued(mask: Tensor, rows: int, end: int) -> Tensor:
    """A prompt's mask for rows that are each one's beams or samples, as far as column `end`."""
    mask = mask.repeat_interleave(max(rows // max(len(mask), 1), 1), dim=0)
    return torch.nn.functional.pad(mask.long(), (0, max(end - mask.shape[1], 0)), value=1)


def _left_padding(mask: Tensor, end: int) -> list[int]:
    if mask.shape[1] < end:
        raise unclear(
            f"the attention mask has {mask.shape[1]} columns and the pass ends in column {end}: "
            "give one for the tokens in the cache too"
        )
    kept = mask[:, :end] != 0
    # A row whose tokens all come later is padding as far as this.
    padding = torch.where(kept.any(1), kept.long().argmax(1), end)
    if not bool((kept.sum(1) == end - padding).all()):
        raise SpecError(
            "the attention mask hides tokens after the first of their row: set "
            "tokenizer.padding_side = 'left', so that positions are counted from the prompt's end",
            code="padding_side",
        )
    found: list[int] = padding.tolist()
    return found


def _from_position_ids(ids: Tensor, end: int) -> list[int]:
    """The padding that position ids show: they count tokens, and the last column is one. (In a row
    that is padding so far it passes for the first, which the next pass puts right.)"""
    found: list[int] = (end - 1 - ids[:, -1]).tolist()
    return found


def unclear(message: str) -> SpecError:
    """The error for a pass of which it is not clear at which positions it feeds what."""
    return SpecError(message, code="unclear_positions")

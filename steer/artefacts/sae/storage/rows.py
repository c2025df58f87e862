"""A matrix with one row for each feature, in memory or in a file, of which a few rows are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.sae.storage.file_arrays import FileArray
from steer.errors import FileFormatError

BLOCK_BYTES = 64 << 20
"""How much of a matrix is in memory at once, in float32, when all of it is gone through."""

KEPT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types that a matrix is stored in; float64 becomes float32."""

_TINY = 1e-12
"""What keeps the division by a row's length finite."""


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Rows `[d_sae, d]` in their own float type, times `scale` `[d_sae]` where there is one.

    Guarantees: what it gives is float32, and equal whether the matrix is held or lies in a file.
    """

    matrix: Tensor | FileArray
    scale: Float[Tensor, " d_sae"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        count, width = self.matrix.shape
        return count, width

    @property
    def held(self) -> bool:
        """Whether the matrix is in memory."""
        return isinstance(self.matrix, Tensor)

    @property
    def resident_bytes(self) -> int:
        scale = 0 if self.scale is None else self.scale.nbytes
        return scale + (self.matrix.nbytes if isinstance(self.matrix, Tensor) else 0)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type that the canonical file keeps the matrix in."""
        return self.matrix.dtype if self.matrix.dtype in KEPT_DTYPES else torch.float32

    def take(self, features: Sequence[int] | None) -> Float[Tensor, "K d"]:
        """The rows of `features`, or all of them for None."""
        if features is None:
            return torch.cat([block for _, block in self.blocks()])
        chosen = torch.tensor(list(features), dtype=torch.long)
        if isinstance(self.matrix, Tensor):
            return self._scaled(self.matrix[chosen], chosen)
        return self._scaled(self.matrix.take(list(features)), chosen)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "B d"]]]:
        """All rows in order, as many at once as `BLOCK_BYTES` hold, each with its first's index."""
        if isinstance(self.matrix, Tensor) and self._plain:
            yield 0, self.matrix
            return
        for start, block in self.stored_blocks():
            yield start, self._scaled(block, slice(start, start + len(block)))

    def stored_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows as they are stored, `[B, d]` in `stored_dtype`, without the scale."""
        count, width = self.shape
        size = max(1, BLOCK_BYTES // (4 * width))
        for start in range(0, count, size):
            stop = min(start + size, count)
            block = (
                self.matrix[start:stop]
                if isinstance(self.matrix, Tensor)
                else self.matrix.rows(start, stop)
            )
            yield start, block.to(self.stored_dtype).contiguous()

    def along(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d_sae"]:
        """⟨row, x⟩ for every row."""
        count, _ = self.shape
        if isinstance(self.matrix, Tensor) and self._plain:
            return x @ self.matrix.T
        out = x.new_empty(*x.shape[:-1], count)
        for start, block in self.blocks():
            out[..., start : start + len(block)] = x @ block.T
        return out

    def combined(self, z: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d"]:
        """Σ zᵢ·rowᵢ; of rows in a file, those alone are read that some z is not 0 for."""
        if isinstance(self.matrix, Tensor) and self._plain:
            return z @ self.matrix
        flat = z.reshape(-1, z.shape[-1])
        out = flat.new_zeros(len(flat), self.shape[1])
        active = (flat != 0).any(0).nonzero()[:, 0]
        size = max(1, BLOCK_BYTES // (4 * self.shape[1]))
        for start in range(0, len(active), size):
            chosen = active[start : start + size]
            out += flat[:, chosen] @ self.take(chosen.tolist())
        return out.reshape(*z.shape[:-1], -1)

    def cosines(
        self, directions: Float[Tensor, "K d"]
    ) -> Iterator[tuple[int, Float[Tensor, "B K"]]]:
        """The cosine of every row with each of `directions`, in blocks as `blocks` gives them; 0
        with a zero row."""
        units = torch.nn.functional.normalize(directions, dim=-1)
        for start, block in self.blocks():
            yield start, block @ units.T / block.norm(dim=-1, keepdim=True).clamp(min=_TINY)

    def norms(self) -> Float[Tensor, " d_sae"]:
        """The length of each row."""
        return torch.cat([block.norm(dim=-1) for _, block in self.blocks()])

    def scaled_by(self, factor: Tensor | float) -> FeatureRows:
        """The same rows times a number, or each times its own `[d_sae]`; nothing is read.

        Raises `FileFormatError` (`mixed_widths`) for factors of another number.
        """
        if isinstance(factor, Tensor) and factor.shape != (self.shape[0],):
            raise FileFormatError(
                f"there are {self.shape[0]} rows and factors for {list(factor.shape)}: encoder and "
                "decoder must have as many features",
                code="mixed_widths",
            )
        scale = torch.ones(self.shape[0]) if self.scale is None else self.scale
        return FeatureRows(self.matrix, (scale * factor).float())

    def check(self, name: str) -> None:
        """Raises `FileFormatError` (`not_finite`) where float32 rows hold NaN or Inf."""
        for _, block in self.blocks():
            # The extremes say it too, without a copy of the largest tensors there are.
            if not all(bool(end.isfinite()) for end in block.aminmax()):
                raise FileFormatError(f"{name} contains NaN or Inf", code="not_finite")

    def in_memory(self) -> FeatureRows:
        """The same rows, held."""
        if isinstance(self.matrix, Tensor):
            return self
        return FeatureRows(self.matrix.load().to(self.stored_dtype), self.scale)

    def on(self, device: torch.device) -> FeatureRows:
        """The same rows, held on `device`."""
        held = self.in_memory()
        assert isinstance(held.matrix, Tensor)
        scale = None if held.scale is None else held.scale.to(device)
        return FeatureRows(held.matrix.to(device), scale)

    @property
    def _plain(self) -> bool:
        return self.scale is None and self.matrix.dtype == torch.float32

    def _scaled(self, block: Tensor, chosen: Tensor | slice) -> Tensor:
        rows = block.float()
        return rows if self.scale is None else rows * self.scale[chosen, None]


def held_rows(matrix: Tensor) -> FeatureRows:
    """Rows from a tensor of any float type."""
    kept = matrix.detach().to("cpu")
    return FeatureRows(kept.to(kept.dtype if kept.dtype in KEPT_DTYPES else torch.float32))

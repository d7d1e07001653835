"""What a round costs on this machine, measured, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of a batch's round, by its width; see `measure`."""

    verify_seconds: tuple[float, ...] = ()  # of a round at each of the plan's widths, no drafting
    draft_seconds: tuple[float, float] = (0.0, 0.0)  # of drafting no token, and M tokens

    @property
    def pair(self) -> tuple[tuple[float, ...], tuple[float, float]]:
        """Both fields."""
        return self.verify_seconds, self.draft_seconds

    def by_length(self, size: int, widths: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Seconds [M+1] of verifying, and of drafting, 0 .. M = size tokens."""
        which = np.searchsorted(np.asarray(widths), np.arange(size + 1) + 1)
        verify = np.asarray(self.verify_seconds or [0.0] * len(widths), np.float32)[which]
        none, full = self.draft_seconds
        draft = np.linspace(none, full, size + 1, dtype=np.float32)
        return jnp.asarray(verify), jnp.asarray(draft)

    def split(
        self, seconds: float, rounds: Sequence[int], widths: Sequence[int]
    ) -> tuple[float, float]:
        """Share of drafting and of verifying in `seconds` that so many `rounds` a width took."""
        if not self.verify_seconds:
            return 0.0, seconds
        most = max(1, widths[-1] - 1)
        none, full = self.draft_seconds
        draft = sum(
            n * (none + (full - none) * (w - 1) / most) for n, w in zip(rounds, widths, strict=True)
        )
        verify = sum(n * c for n, c in zip(rounds, self.verify_seconds, strict=True))
        share = draft / (draft + verify) if draft + verify else 0.0
        return seconds * share, seconds * (1 - share)

"""One process, no wrapper.

Owns: the plain engine, the reference that every other is compared with. Does not own: exact numerics (`exact.py`).
"""

from __future__ import annotations

from torch import nn

from train.strategy import Strategy, Values, materialise


class Single(Strategy):
    """Plain torch on one device."""

    def wrap(self, values: Values, blocks: list[nn.Module]) -> None:
        materialise(self.module, self.procs.device, values)
        self.model = self.module

    def name_in_force(self) -> str:
        return "single" if self.model is self.module else type(self.model).__name__

"""Muon's Newton-Schulz iteration in a precision that the processor multiplies in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from skipway.hardware.device import cpu_has_bfloat16

__all__ = ["muon_class"]


@cache
def muon_class(library_class: type[Any]) -> type[Any]:
    """Muon of pytorch_optimizer, which on CPUs without native bfloat16 iterates in float32.

    The library iterates in bfloat16 everywhere. A CPU without native bfloat16 products takes some 30 times as long for
    them as for those of float32 (a 256 x 2304 matrix on AVX2: 1.4 s and 0.04 s): more than all else in a training step.
    """
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    class Muon(library_class):
        def init_group(self, group: dict[str, Any], **more: Any) -> None:
            """Begin the moments of parameters that have none, or in a stored run those of the other method."""
            own = "momentum_buffer" if group["use_muon"] else "exp_avg"
            for parameter in group["params"]:
                if self.state.get(parameter) and own not in self.state[parameter]:
                    self.state[parameter].clear()
            super().init_group(group, **more)

        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
            quick = updates[0].device.type != "cpu" or cpu_has_bfloat16()
            if quick or group.get("ns_method") == "gram_newton_schulz":
                return library_class._orthogonalize(group, updates)
            choices = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
            matrices = [update.reshape(update.size(0), -1) for update in updates]
            return [zero_power_via_newton_schulz_5(matrix, **choices) for matrix in matrices]

    return Muon

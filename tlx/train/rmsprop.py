"""RMSprop with a flag for a step that is not finite; see :mod:`tlx.train.optim`."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import RMSprop


class FlaggedRMSprop(RMSprop):
    """torch's RMSprop, of which there is no fused kernel, with its flag for a step that is not finite.

    Where ``found_inf`` is set and not 0, every factor is the one that changes nothing (a decay of 1, a rate of 0) and
    gradients count as 0. Values are those of ``torch.optim.RMSprop(foreach=True)``, but for the rounding of the last
    product; state has its names, without `step`, which nothing reads.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        overflow: torch.Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._move(group, parameters, None if overflow is None else overflow.bool())

    def _move(self, group: dict[str, Any], parameters: list[torch.Tensor], overflow: torch.Tensor | None) -> None:
        def factor(value: float, neutral: float) -> Any:
            return value if overflow is None else torch.where(overflow, neutral, value)

        squares = self._states("square_avg", parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        if overflow is not None:
            gradients = [g.masked_fill(overflow, 0.0) for g in gradients]
        torch._foreach_mul_(squares, factor(group["alpha"], 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, group["eps"])
        if group["momentum"]:
            moves = self._states("momentum_buffer", parameters)
            torch._foreach_mul_(moves, factor(group["momentum"], 1.0))
            torch._foreach_addcdiv_(moves, gradients, divisors)
        else:
            moves = list(torch._foreach_div(gradients, list(divisors)))
        torch._foreach_add_(parameters, torch._foreach_mul(moves, factor(-group["lr"], 0.0)))

    def _states(self, name: str, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """This state of each parameter, zeros where there is none yet."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[p][name] for p in parameters]

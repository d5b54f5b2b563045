"""Muon in PyTorch, as in `optim.make_optimizer`. PyTorch's own takes only matrices, and rounds them to bfloat16."""

import math

import torch

from jaxnets.optim import MUON_RMS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that brings the singular values close to 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalised updates for convolutions except depthwise ones, Adam's for the rest; decoupled weight decay.

    Args:
      params: parameters, or groups of them, each with its `weight_decay`.
      momentum, nesterov: of Muon; `nesterov` also turns Adam into NAdam.
      betas, epsilon: of Adam; `epsilon` keeps both from dividing by 0.
    """

    def __init__(self, params, momentum: float, nesterov: bool, betas: tuple[float, float], epsilon: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum, self.nesterov, self.betas, self.epsilon = momentum, nesterov, betas, epsilon

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices, rest = ([p for p in parameters if _is_matrix(p) == wanted] for wanted in (True, False))
            for updated, direction in ((matrices, self._muon), (rest, self._adam)):
                if updated:
                    updates = direction(updated)
                    torch._foreach_add_(updates, updated, alpha=group["weight_decay"])
                    torch._foreach_add_(updated, updates, alpha=-group["lr"])

    def _muon(self, parameters):
        """Muon's updates; parameters of one shape are stacked, so that their products are batched."""
        self._count(parameters, "mean")
        by_shape: dict[torch.Size, list[int]] = {}
        for number, parameter in enumerate(parameters):
            by_shape.setdefault(parameter.shape, []).append(number)
        means = self._means(parameters, self.momentum)
        for shape, numbers in by_shape.items():
            stack = torch.stack([means[number] for number in numbers]).flatten(2)
            scale = MUON_RMS * math.sqrt(max(stack.shape[1:]))
            for number, update in zip(numbers, scale * orthogonal(stack, self.epsilon)):
                means[number] = update.reshape(shape)
        return means

    def _adam(self, parameters):
        beta1, beta2 = self.betas
        self._count(parameters, "mean", "squares")
        gradients, squares = [p.grad for p in parameters], self._kept(parameters, "squares")
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        deviations = torch._foreach_div(squares, [1 - beta2**step for step in self._kept(parameters, "step")])
        torch._foreach_sqrt_(deviations)
        torch._foreach_add_(deviations, self.epsilon)
        return list(torch._foreach_div(self._means(parameters, beta1), deviations))

    def _means(self, parameters, beta):
        """Bias-corrected means of the gradients so far; with `nesterov`, as they will be a step later."""
        gradients, steps = [p.grad for p in parameters], self._kept(parameters, "step")
        means = self._kept(parameters, "mean")
        torch._foreach_mul_(means, beta)
        torch._foreach_add_(means, gradients, alpha=1 - beta)
        if not self.nesterov:
            return list(torch._foreach_div(means, [1 - beta**step for step in steps]))
        ahead = list(torch._foreach_mul(means, [beta / (1 - beta ** (step + 1)) for step in steps]))
        weights = [(1 - beta) / (1 - beta**step) for step in steps]
        torch._foreach_add_(ahead, torch._foreach_mul(gradients, weights))
        return ahead

    def _count(self, parameters, *names):
        """Count one more step in the state of each; its entries with these names start as zeros."""
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)

    def _kept(self, parameters, name):
        return [self.state[parameter][name] for parameter in parameters]


def _is_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon updates it, as in `optim._is_matrix`."""
    return parameter.ndim == 4 and parameter.shape[1] > 1


def orthogonal(matrices: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The matrices `(..., rows, columns)` with singular values brought close to 1, by Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

"""Muon in PyTorch as `optim.make_optimizer` has it. PyTorch's own takes matrices alone, and rounds them to bfloat16."""

import math

import torch

from jaxnets.optim import MUON_RMS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic's, by which the singular values come near 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonal updates for convolutions, depthwise ones excepted, Adam's for the rest; decoupled weight decay.

    Args:
      params: parameters or groups of them, which have a `weight_decay` each.
      momentum, nesterov: of Muon; `nesterov` makes Adam NAdam too.
      betas, epsilon: of Adam; `epsilon` keeps both from dividing by 0.
    """

    def __init__(self, params, momentum: float, nesterov: bool, betas: tuple[float, float], epsilon: float):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum, self.nesterov, self.betas, self.epsilon = momentum, nesterov, betas, epsilon

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                is_muons = parameter.ndim == 4 and parameter.shape[1] > 1
                update = (self._muon if is_muons else self._adam)(parameter.grad, state)
                parameter.add_(update + group["weight_decay"] * parameter, alpha=-group["lr"])

    def _muon(self, gradient, state):
        matrix = self._mean(gradient, state, self.momentum).reshape(len(gradient), -1)
        scale = MUON_RMS * math.sqrt(max(matrix.shape))
        return scale * orthogonal(matrix, self.epsilon).reshape(gradient.shape)

    def _adam(self, gradient, state):
        beta1, beta2 = self.betas
        squares = _kept("squares", gradient, state)
        squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (squares / (1 - beta2 ** state["step"])).sqrt_()
        return self._mean(gradient, state, beta1) / (deviation + self.epsilon)

    def _mean(self, gradient, state, beta):
        """Of the gradients so far, without the bias of its start; with `nesterov`, as it will be a step later."""
        mean, step = _kept("mean", gradient, state), state["step"]
        mean.mul_(beta).add_(gradient, alpha=1 - beta)
        if not self.nesterov:
            return mean / (1 - beta**step)
        return beta / (1 - beta ** (step + 1)) * mean + (1 - beta) / (1 - beta**step) * gradient


def _kept(name, like, state):
    """What a parameter's state has of that name, at first zeros."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def orthogonal(matrix: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The matrix with singular values near 1, by Newton-Schulz iterations."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + epsilon)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x

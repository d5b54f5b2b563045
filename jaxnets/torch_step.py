"""Training a net in PyTorch: its weights, its optimizer, its data, a step and an evaluation, as `step` has ours.

Augmentation (`torch_augment`) and dropout use the same distributions as ours, with other draws. Everything is on the
device.
"""

import contextlib
import dataclasses
from typing import Any

import flax.linen
import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jaxnets import data, plan, settings, torch_nets, torch_weights
from jaxnets.errors import UserError
from jaxnets.torch_augment import augment, normalize
from jaxnets.torch_muon import Muon
from jaxnets.torch_nets import FORMATS

OPTIMIZERS = ("sgd", "adamw", "rmsprop", "muon")

Examples = dict[str, torch.Tensor]  # {'image': uint8 (N, 3, S, S), 'label': int64 (N,)}


@dataclasses.dataclass(frozen=True)
class TorchRun:
    """A net in training, with its data on the device."""

    plan: plan.Plan
    net: nn.Module
    optimizer: torch.optim.Optimizer
    train_examples: Examples
    eval_examples: Examples
    layout: str  # of `FORMATS`

    @property
    def memory_format(self) -> torch.memory_format:
        return FORMATS[self.layout]

    @property
    def device(self) -> torch.device:
        return self.train_examples["image"].device


def make_net(name: str, model: flax.linen.Module, variables: dict[str, Any]) -> nn.Module:
    """The PyTorch net of that name with the weights of ours; UserError if they do not fit."""
    net = torch_nets.NETS[name](num_classes=model.num_classes)
    entries, exported = net.state_dict(), torch_weights.export(model, variables)
    if exported.keys() != entries.keys():
        # Nets written in `torch_nets` have no published layout, but have their modules in forward order, as ours do.
        exported = dict(zip(entries, torch_weights.export(model, variables, "jaxnets").values(), strict=True))
    for entry, value in exported.items():
        if entries[entry].shape != value.shape:
            shapes = f"{tuple(entries[entry].shape)} in PyTorch and {value.shape} here"
            raise UserError(f"--against=torch: {entry} of {name} is {shapes}")
    net.load_state_dict({entry: torch.from_numpy(np.array(value)) for entry, value in exported.items()})
    return net


def make_optimizer(net: nn.Module, config: ml_collections.ConfigDict) -> torch.optim.Optimizer:
    """The counterpart of `optim.make_optimizer`; the learning rate is set before every step."""
    decaying = [p for p in net.parameters() if _decays(p, config)]
    exempt = [p for p in net.parameters() if not _decays(p, config)]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, 0.0, config.momentum, nesterov=nesterov, fused=True)
    betas = config.beta1, config.beta2
    if config.name == "adamw":
        return torch.optim.AdamW(groups, 0.0, betas, config.epsilon, fused=True)
    if config.name == "muon":
        return Muon(groups, config.momentum, config.nesterov, betas, config.epsilon)
    return torch.optim.RMSprop(groups, 0.0, config.beta2, config.epsilon, momentum=config.momentum, foreach=True)


def _decays(parameter: nn.Parameter, config: ml_collections.ConfigDict) -> bool:
    """Whether weight decay applies, as in `optim.decay_mask`."""
    is_depthwise = parameter.ndim == 4 and parameter.shape[1] == 1
    return config.decay_depthwise or not is_depthwise if parameter.ndim > 1 else config.decay_vectors


def load_examples(split: data.Split, device: str) -> Examples:
    """A split, decoded, on the device."""
    decoded = data.decode(split)
    return {
        "image": torch.from_numpy(decoded["image"]).permute(0, 3, 1, 2).contiguous().to(device),
        "label": torch.from_numpy(decoded["label"].astype(np.int64)).to(device),
    }


def take_step(run: TorchRun, indices: torch.Tensor, rate: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One update on the examples at `indices`, resized to `size`: mean loss and number correct."""
    config, labels = run.plan.config, run.train_examples["label"][indices]
    images = augment(run.train_examples["image"][indices], config, size)
    images = images.contiguous(memory_format=run.memory_format)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    with autocast(config, run.device):
        logits = run.net(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    loss.backward()
    if config.optimizer.clip_norm:
        nn.utils.clip_grad_norm_(run.net.parameters(), config.optimizer.clip_norm)
    run.optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


@torch.inference_mode()
def evaluate(
    net: nn.Module, examples: Examples, config: ml_collections.ConfigDict, memory_format: torch.memory_format
) -> dict[str, Any]:
    """The record of an evaluation of a net on examples, without its step."""
    net.eval()
    images, labels = examples["image"], examples["label"]
    loss, correct = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    for batch, expected in zip(images.split(config.eval_batch_size), labels.split(config.eval_batch_size)):
        with autocast(config, images.device):
            logits = net(normalize(batch, config).contiguous(memory_format=memory_format))
        loss += F.cross_entropy(logits.float(), expected, reduction="sum")
        correct += (logits.argmax(1) == expected).sum()
    return {
        "eval_loss": float(loss) / len(labels),
        "eval_accuracy": int(correct) / len(labels),
        "num_examples": len(labels),
    }


def autocast(config: ml_collections.ConfigDict, device: torch.device):
    """A context with the net's compute dtype."""
    if settings.compute_dtype(config.model.dtype) == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()

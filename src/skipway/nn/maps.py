"""Linear maps that know how they start (`reset_parameters`), and a view of one for schemes to work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.nn.computed_weights import computed_weight, multiply_tensor
from skipway.nn.initial import FanInUniform, HeNormal, Initial

__all__ = ["Classifier", "Conv2d", "Linear", "LinearMap", "ScaledStandardConv2d", "ScaledStandardLinear"]


class Conv2d(nn.Conv2d):
    """A convolution without bias (unless asked) that starts from `initial`; the bias starts at 0.

    By default the padding is kernel_size // 2 for odd kernels and 0 for even ones.

    Shapes: (N, in_channels, H, W) → (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉) for odd `kernel_size`.

    >>> Conv2d(3, 16, 3, stride=2)
    Conv2d(3, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        initial: Initial = HeNormal("fan_out"),  # noqa: B008 - frozen
        padding: int | None = None,
    ) -> None:
        self.initial = initial
        if padding is None:
            padding = kernel_size // 2 if kernel_size % 2 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Back to the starting distribution."""
        start(self)


class ScaledStandardConv2d(Conv2d):
    """A convolution with scaled weight standardisation: Ŵ = g · (W - μ) / √max(σ²·fan_in, ε), bias always.

    μ and σ² are taken over the fan-in of each output channel, g is a learned gain per output channel that starts
    at 1, ε = 1e-4 (Brock, De, Smith 2021, eq. 2 and the authors' code). With unit-variance input of zero mean the
    output has unit variance.

    >>> conv = ScaledStandardConv2d(64, 8, 3)
    >>> bool(torch.allclose(conv.standardised().var(dim=(1, 2, 3), correction=0) * 64 * 9, torch.ones(8), atol=1e-4))
    True
    """

    epsilon = 1e-4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        initial: Initial = HeNormal("fan_in"),  # noqa: B008 - frozen
        padding: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups, True, initial, padding)
        self.gain = nn.Parameter(torch.ones(out_channels))

    def reset_parameters(self) -> None:
        """Back to the starting distribution, gains 1."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # absent while the base class is still under construction
            nn.init.ones_(self.gain)

    def standardised(self) -> Tensor:
        """Ŵ, the weight that the convolution uses."""
        return standardise(self.weight, self.gain, self.epsilon)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardised(), self.bias)


class Linear(nn.Linear):
    """A linear layer y = Wx + b that starts from `initial`; the bias starts at 0.

    >>> Linear(8, 4)
    Linear(in_features=8, out_features=4, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        initial: Initial = FanInUniform(),  # noqa: B008 - frozen
    ) -> None:
        self.initial = initial
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Back to the starting distribution."""
        start(self)


class ScaledStandardLinear(Linear):
    """A linear layer with scaled weight standardisation, as `ScaledStandardConv2d`.

    >>> linear = ScaledStandardLinear(64, 8)
    >>> bool(torch.allclose(linear.standardised().var(dim=1, correction=0) * 64, torch.ones(8), atol=1e-4))
    True
    """

    epsilon = 1e-4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        initial: Initial = FanInUniform(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(in_features, out_features, True, initial)
        self.gain = nn.Parameter(torch.ones(out_features))

    def reset_parameters(self) -> None:
        """Back to the starting distribution, gains 1."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # absent while the base class is still under construction
            nn.init.ones_(self.gain)

    def standardised(self) -> Tensor:
        """Ŵ, the weight that the layer uses."""
        return standardise(self.weight, self.gain, self.epsilon)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.standardised(), self.bias)


class Classifier(Linear):
    """The last linear layer of a network: (N, features) → (N, classes). Its type is how schemes find it."""


@dataclass(frozen=True)
class LinearMap:
    """One linear map on a branch's path: a module, or the rows of one (the values in an attention's `qkv`).

    Args:
        module: the owner of the weight, of shape (out, in, ...).
        rows: outputs that belong to the map; by default all.
    """

    module: nn.Module
    rows: slice | None = None

    @property
    def name(self) -> str:
        """The module's attribute in which the map's output is linear: the weight, or the gain of a standardised one, of
        ours or of timm's, with a number per output.
        """
        gain = getattr(self.module, "gain", None)
        if not isinstance(gain, Tensor):
            return "weight"
        weight = getattr(self.module, "weight", None)
        return "gain" if isinstance(weight, Tensor) and gain.shape[:1] == weight.shape[:1] else "weight"

    @property
    def weight(self) -> Tensor:
        """The tensor in which the map's output is linear, or the map's rows of it."""
        parameter = getattr(self.module, self.name)
        assert isinstance(parameter, Tensor)
        return parameter if self.rows is None else parameter[self.rows]

    @torch.no_grad()
    def multiply_(self, factor: float) -> None:
        """Multiply the map's output by `factor`, in place; biases are left alone.

        Raises:
            SkipwayError: the weight is computed from others, which do not multiply it.
        """
        if not multiply_tensor(self.module, self.name, factor, self.rows):
            raise computed_weight(f"the {self.name} of a map ({type(self.module).__name__})")

    def zero_(self) -> None:
        """Silence the map."""
        self.multiply_(0.0)


def standardise(weight: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """g · (W - μ) / √max(σ²·fan_in, ε), with μ and σ² over the fan-in of each output channel."""
    rows = weight.flatten(1)
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    scale = torch.rsqrt((variance * rows.shape[1]).clamp(min=epsilon)) * gain.unsqueeze(1)
    return ((rows - mean) * scale).view_as(weight)


def start(module: Conv2d | Linear) -> None:
    """Fill the weight from the module's distribution, its bias with 0; on the meta device there is nothing to fill."""
    if module.weight.is_meta:  # torch's random fills are slow there: a millisecond each
        return
    module.initial(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)

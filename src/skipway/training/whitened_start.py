"""`start="whitened"`: random weights, but for the first convolution, which whitens patches of the training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.hardware.precision import exact
from skipway.tracing import preserved_state

__all__ = ["first_convolution", "whiten_"]

PATCHED_IMAGES = 1000
"""Images that patches are taken of."""
VALUES = 1 << 23
"""Numbers in the patches that are held at a time."""
LEAST_VARIANCE = 5e-4
"""Added to the variance of each direction, so that directions without signal are not amplified (Jordan 2024)."""


def first_convolution(model: nn.Module, images: Tensor) -> tuple[str, nn.Conv2d]:
    """The name of the convolution that the images reach first, and the convolution; the model is left unchanged.

    Raises:
        SkipwayError: there is none with these channels in one group.
    """
    called: list[tuple[str, nn.Conv2d]] = []
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [
        module.register_forward_hook(lambda *_, pair=(name, module): called.append(pair))
        for name, module in convolutions
    ]
    try:
        with torch.no_grad(), preserved_state(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not called or called[0][1].groups != 1 or called[0][1].in_channels != images.shape[1]:
        raise SkipwayError(
            f"start='whitened': the rule is a network that begins with a convolution of the {images.shape[1]} channels "
            f"of the images in one group, and {type(model).__name__} has none; start='random' takes any network"
        )
    return called[0]


def patch_covariance(convolution: nn.Conv2d, images: Tensor) -> Tensor | None:
    """The covariance of the patches of images that a convolution sees, in float64 (see `exact`); None of one
    patch or none.

    Sums over some images at a time: the patches of 1,000 images of 224 × 224 pixels for 7 × 7 filters take 7 GB.

    Args:
        convolution: whose padding is left out.
        images: (N, C, H, W).
    """
    rows, columns = (
        max(0, 1 + (side - dilation * (kernel - 1) - 1) // stride)
        for side, kernel, dilation, stride in zip(
            images.shape[2:], convolution.kernel_size, convolution.dilation, convolution.stride, strict=True
        )
    )
    count, values = rows * columns * len(images), convolution.weight[0].numel()
    if count < 2:
        return None
    total, products = exact(images.new_zeros(values)), exact(images.new_zeros(values, values))
    for part in images.split(max(1, VALUES // (rows * columns * values))):
        patches = nn.functional.unfold(
            exact(part), convolution.kernel_size, dilation=convolution.dilation, stride=convolution.stride
        )
        patches = patches.transpose(1, 2).flatten(0, 1)
        total += patches.sum(0)
        products += patches.T @ patches
    return (products - total.outer(total) / count) / (count - 1)


@torch.no_grad()
def whiten_(model: nn.Module, images: Tensor) -> str:
    """Set the first convolution of a model, in place, so that its outputs on patches of the images are uncorrelated and
    have variance 1; in words, what was set.

    The filters are v / sqrt(λ + ε) and their negatives, for the leading eigenvectors v of the covariance of patches
    and their variances λ, as many pairs as there are filters or directions; further filters stay as they are
    (Jordan 2024, arXiv 2404.00498, section 3.2).

    Args:
        model: begins with a convolution.
        images: normalised, (N, C, H, W).

    >>> import skipway as sw
    >>> model = sw.build("resnet-patch8", classes=10)
    >>> whiten_(model, torch.randn(64, 3, 8, 8)).partition(":")[0]
    'random weights, but for stem.conv'
    """
    name, convolution = first_convolution(model, images[:2])
    weight = convolution.weight
    covariance = patch_covariance(convolution, images.to(weight.device, torch.float32))
    if covariance is None:
        raise SkipwayError(
            f"start='whitened': the images are smaller than the {convolution.kernel_size[0]} x "
            f"{convolution.kernel_size[1]} filters of {name}; start='random' takes any size"
        )
    variances, vectors = torch.linalg.eigh(covariance)
    pairs = min(len(weight) // 2, len(variances))
    leading = (vectors / (variances.clamp(min=0) + LEAST_VARIANCE).sqrt()).T.flip(0)[:pairs]
    filters = torch.stack([leading, -leading], 1).flatten(0, 1).reshape(-1, *weight.shape[1:])
    weight[: len(filters)] = filters.to(weight)
    if convolution.bias is not None:
        convolution.bias[: len(filters)] = 0
    share = float(variances.flip(0)[:pairs].sum() / variances.sum())
    return (
        f"random weights, but for {name}: {len(filters)} of {len(weight)} filters whiten patches of the training "
        f"images, along {pairs} of {len(variances)} directions with {100 * share:.1f} % of the variance"
    )

"""Inception-V3 (Szegedy et al., arXiv:1512.00567): torchvision's network without the auxiliary classifier.

Parameters with 1,000 classes 23.83 M, MACs at 299 x 299 5.71 G. It takes images of at least 75 x 75 pixels
and was made for 299 x 299; there is no variant for smaller ones.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import inception_v3 as torchvision_inception_v3

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_classes_and_shape, set_in_channels

_MIN_SIDE = 75


def inception_v3(
    *, num_classes: int, in_shape: tuple[int, int, int], dropout: float = 0.5, draw_weights: bool = True
) -> nn.Module:
    """Builds Inception-V3 with torchvision's names; the output is one tensor of logits in either mode.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; height and width at least 75.
        dropout: probability of dropping an activation before the last layer, in [0, 1).
        draw_weights: whether to draw the truncated normal weights of the paper, which takes time; False
            leaves PyTorch's defaults, enough where a checkpoint follows.

    Raises:
        ConfigError: if the image is too small or dropout out of range.
    """
    channels, _, _ = check_classes_and_shape("inception_v3", num_classes, in_shape, _MIN_SIDE)
    if not 0 <= dropout < 1:
        raise ConfigError(f"inception_v3: dropout is {dropout!r}, not in [0, 1)")
    model = torchvision_inception_v3(
        weights=None,
        num_classes=num_classes,
        aux_logits=False,
        transform_input=False,
        init_weights=draw_weights,
        dropout=dropout,
    )
    if channels != 3:
        set_in_channels(model, channels)
    return model

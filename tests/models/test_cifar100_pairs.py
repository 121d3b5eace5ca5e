"""The networks of the tables of distillation on CIFAR-100 have the sizes that these publish."""

from __future__ import annotations

import pytest
import torch

from prune_cli.config.compose import compose
from prune_cli.config.nodes import resolve


@pytest.mark.parametrize(
    ("recipe", "teacher", "student"),
    [  # parameters with 100 classes, of RepDistiller's networks
        ("wrn_16_2_cifar100_kd", 2_255_156, 703_284),
        ("vgg8_cifar100_kd", 9_462_180, 3_965_028),
        ("resnet20_cifar100_kd_hinton", 861_620, 278_324),
    ],
)
def test_teacher_and_student(recipe: str, teacher: int, student: int) -> None:
    config = compose([f"recipe={recipe}"]).config
    for node, expected in ((config["model"], teacher), (config["student"]["network"], student)):
        facts = {"num_classes": 100, "in_shape": [3, 32, 32]}
        with torch.device("meta"):
            model = resolve({**{key: value for key, value in node.items() if key != "weights"}, **facts}, "model")
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_vgg_8_pools_three_times() -> None:
    """RepDistiller's VGG keeps 4 x 4 maps to the end on 32 x 32: as many parameters as with five poolings, other MACs."""
    node = compose(["recipe=vgg8_cifar100_kd"]).config["student"]["network"]
    facts = {"num_classes": 100, "in_shape": [3, 32, 32]}
    model = resolve({**{key: value for key, value in node.items() if key != "weights"}, **facts}, "model")
    with torch.no_grad():
        assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)

"""Statistics of norms again: the mean over batches, as PyTorch computes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.errors import DataError
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.training.batch_norm import recalibrate_bn


# -------------------------------------------------------------------------------------------- recalibration
def test_recalibration_is_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=None))
    model[0].eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    batches = [2 * torch.randn(6, 3, 4, 4) + 1, torch.randn(4, 3, 4, 4)]
    recalibrate_bn(model, [(batches[0], torch.zeros(6)), batches[1]])
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    var = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, mean, atol=1e-6)
    assert torch.allclose(model[0].running_var, var, rtol=1e-5)
    # without dropout, what the second norm sees is normalised
    assert torch.allclose(model[2].running_mean, torch.zeros(3), atol=1e-5)
    assert [model[0].momentum, model[2].momentum] == [0.3, None]
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_recalibration_equals_pytorchs() -> None:
    model = resnet_cifar(num_classes=3, in_shape=(1, 8, 8), depth=8, widths=(2, 3, 4))
    batches = list(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
    recalibrate_bn(model, batches)
    ours = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.optim.swa_utils.update_bn(batches, model)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())


def test_recalibration_without_batches_changes_nothing() -> None:
    model = nn.BatchNorm2d(2)
    model.running_mean.fill_(3)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no images"):
        recalibrate_bn(model, [])
    assert model.running_mean.tolist() == [3, 3]  # type: ignore[union-attr]
    recalibrate_bn(nn.Linear(2, 2), [torch.zeros(1, 2)])

"""On a GPU: every tensor where it must be, in whole runs and from Python. The GPU is pretended, see pretended.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli import load_pruned, save_pruned, shrink
from tests.pretended import gpu

RUN = ("run", "device=cuda", "threads=1", "limit_batches=1", "train.epochs=1", "finetune.epochs=1")
NET = ("model=resnet20", "model.depth=8", "model.widths=[4,8,8]")
RUNS = {
    "filter": (
        "recipe=digits_filter", *NET, "stages=[train,sparsify,prune,recalibrate,finetune]", "sparsify.epochs=1",
        "criterion=taylor", "distillation=hinton", "regulariser=group_lasso", "finetune.fit.ema=0.9",
    ),
    "n_m": (
        "recipe=quickstart", *NET, "stages=[train,permute,prune,finetune]", "granularity=n_m", "granularity.ratio=0.5",
        "finetune.fit.clip=1", "latency=false", "distillation=hinton", "distillation.cache=store",
    ),
    "sr_ste": (
        "recipe=quickstart", *NET, "stages=[sr_ste]", "granularity=n_m", "granularity.ratio=0.5", "sr_ste.epochs=1",
        "latency=false",
    ),
    "admm": ("recipe=digits_admm", "latency=false"),
    "skeleton": ("recipe=digits_stripe_skeleton", "skeleton.epochs=1"),
    "share": ("recipe=lenet5_digits_deep_compression", "share.epochs=1", "latency=false"),
    "hrank": ("recipe=digits_filter", *NET, "criterion=hrank", "granularity.budget={macs: 0.5}", "latency=false"),
    "sensitivity": ("recipe=digits_filter", *NET, "stages=[train,sensitivity]", "sensitivity.ratios=[0.5]", "latency=false"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks={"filter": (), "admm": pytest.mark.thorough}.get(name, pytest.mark.slow))
        for name in RUNS
    ],
)
def test_whole_runs_keep_their_tensors_together(prune, monkeypatch, name):
    with gpu(monkeypatch):
        result = prune(*RUN, *RUNS[name])
    assert result.code == 0, result.err
    assert set(result.rows.device) == {"pretended GPU"}


class Mixed(nn.Module):
    """Norms over channels, attention, and channels picked by a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.wide = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 24, 3)
        self.layer_norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 5)
        self.register_buffer("order", torch.arange(16).flip(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.conv(images)).relu()
        found = self.wide(found).flatten(2)[:, :, self.order].transpose(1, 2)
        found = self.layer_norm(found)
        found = found + self.attention(found, found, found)[0]
        return self.head(found.softmax(-1).mean(1))


@pytest.mark.parametrize("criterion", ["fpgm", "taylor", "mean_activation"])
def test_shrinking_from_python_stays_on_the_device(monkeypatch, tmp_path, criterion):
    torch.manual_seed(0)
    dense = Mixed().eval()
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    with gpu(monkeypatch):
        model, example = Mixed().to("cuda"), images[:1].cuda()
        model.load_state_dict(dense.state_dict())
        batches = [(images.cuda(), labels.cuda())]
        small = shrink(model.eval(), example, 0.5, criterion=criterion, batches=batches)
        assert {tensor.device for tensor in small.state_dict().values()} == {torch.device("cuda:0")}
        outputs = small(images.cuda()).cpu()
        save_pruned(small, tmp_path)
    again = load_pruned(tmp_path, model=Mixed())
    assert torch.equal(again(images), outputs)
    assert sum(p.numel() for p in again.parameters()) < 0.5 * sum(p.numel() for p in dense.parameters())


def test_the_pretended_gpu_refuses_what_a_real_one_refuses(monkeypatch):
    with gpu(monkeypatch):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there + 1).device == there[1:].device == torch.zeros_like(there).device == torch.device("cuda:0")
        assert here.device == there.cpu().device == torch.device("cpu")
        assert there[torch.tensor([0, 2])].is_cuda
        for mistake in (
            lambda: there + here,
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
            lambda: there.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mistake()
    assert here.device == torch.ones_like(there).device == torch.device("cpu")

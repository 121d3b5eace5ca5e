"""The Python API: any module, any inputs, and two files that bring it back in a fresh process."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from prune_cli import load_pruned, save_pruned, shrink
from prune_cli.errors import CheckpointError, ConfigError, SurgeryError
from tests.conftest import ROOT

OWN = '''
import torch
from torch import nn

class Two(nn.Module):
    """Two inputs, a dict of outputs, and a custom attribute that holds a width."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(1, 16)
        self.extra = nn.Linear(5, 16)
        self.mix = nn.Conv2d(16, 12, 1)
        self.width = 12
        self.head = nn.Linear(12, 4)
        self.box = nn.Linear(12, 2)

    def forward(self, image, extra):
        x = torch.relu(self.norm(self.image(image)) + self.extra(extra)[:, :, None, None])
        x = torch.relu(self.mix(x)).mean((2, 3)).view(-1, self.width)
        return {"classes": self.head(x), "box": self.box(x)}
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, importable from a file."""
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_net", None)
    import own_net

    yield own_net
    sys.modules.pop("own_net", None)


def inputs(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randn(count, 5, generator=generator)


def test_importing_the_package_is_light_and_names_are_found():
    code = (
        "import sys, prune_cli; assert 'torch' not in sys.modules; prune_cli.shrink; assert 'torch' in sys.modules\n"
        "assert not hasattr(prune_cli, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_own_network_with_two_inputs_and_a_dict_shrinks_learns_and_comes_back_in_a_fresh_process(own, tmp_path):
    model = own.Two()
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, inputs(), ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (small.image.out_channels, small.mix.out_channels, small.width, small.head.out_features) == (8, 6, 6, 4)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (small(*inputs())["classes"].square().sum() + small(*inputs())["box"].sum()).backward()
        optimizer.step()
    again = shrink(copy.deepcopy(small), inputs(), ratio={"mix": 0.5})
    assert (again.image.out_channels, again.mix.out_channels) == (8, 3)
    save_pruned(again, tmp_path / "small")
    wanted = again.eval()(*inputs())
    code = (
        "import sys, torch, own_net; from prune_cli import load_pruned\n"
        "generator = torch.Generator().manual_seed(1)\n"
        "x = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 5, generator=generator)\n"
        "torch.set_num_threads(1)\n"
        "out = load_pruned(sys.argv[1], model=own_net.Two())(*x)\n"
        "print(out['classes'].tolist(), out['box'].tolist())"
    )
    place = tmp_path / "small"
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(place)], cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == f"{wanted['classes'].tolist()} {wanted['box'].tolist()}"
    with pytest.raises(CheckpointError, match=r"model=MyNet\(\)"):
        load_pruned(place)
    with pytest.raises(CheckpointError, match="does not fit Sequential"):
        load_pruned(place, model=nn.Sequential(nn.Linear(2, 2)))
    save_pruned(load_pruned(place, model=own.Two()), tmp_path / "copy")
    assert (tmp_path / "copy/pruned.yaml").read_bytes() == (place / "pruned.yaml").read_bytes()


def test_named_builder_needs_no_model(tmp_path):
    from prune_cli.models.torchvision import torchvision

    arguments = {"name": "squeezenet1_1", "num_classes": 10, "in_shape": [3, 64, 64]}
    torch.manual_seed(0)
    small = shrink(torchvision(**arguments), torch.zeros(1, 3, 64, 64), ratio=0.5)
    save_pruned(small, tmp_path, builder={"_target_": "prune_cli.models.torchvision.torchvision", **arguments})
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path)(image), small.eval()(image))
    with pytest.raises(CheckpointError, match="outside prune"):
        save_pruned(small, tmp_path, builder={"_target_": "os.getcwd"})


def sequence() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


IMAGE = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("level", ["element", "channel"])
def test_own_criterion_of_either_level(level):
    def last(view):
        scores = torch.arange(len(view.weight), dtype=torch.float32)
        return scores if level == "channel" else scores.view(-1, *[1] * (view.weight.dim() - 1)).expand_as(view.weight)

    small = shrink(sequence(), IMAGE, criterion=last)
    assert torch.equal(small[0].weight, sequence()[0].weight[4:])
    assert torch.equal(small[3].weight, sequence()[3].weight[4:, 4:])


@pytest.mark.parametrize("criterion", ["apoz", "taylor", "taylor_gate", "fpgm", "clustering"])
def test_criteria_of_the_command_line(criterion):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator))]
    model = sequence()
    model[3] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    small = shrink(model, IMAGE, criterion=criterion, batches=batches)
    assert small[0].out_channels == 4


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    return layer


@pytest.mark.parametrize(
    "norm",
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.spectral_norm,
     nn.utils.spectral_norm, halved],
)  # fmt: skip
def test_layers_whose_weight_is_computed_shrink_by_that_weight(norm, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 8, 1)), nn.Flatten(), nn.Linear(128, 4)
        ).eval()

    model = network()
    model(IMAGE)
    sizes = model[0].weight.detach().abs().sum((1, 2, 3))
    kept = sizes.argsort(descending=True)[:4].sort().values
    small = shrink(model, IMAGE)
    assert torch.allclose(small[0].bias, model[0].bias[kept])
    save_pruned(small, tmp_path)
    small(IMAGE).sum().backward()
    assert torch.equal(load_pruned(tmp_path, model=network())(IMAGE), small.eval()(IMAGE))


def test_criteria_of_gradients_say_that_a_computed_weight_has_none():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(128, 4))
    with pytest.raises(ConfigError, match="not measured"):
        shrink(model, IMAGE, criterion="taylor", batches=[(IMAGE, torch.zeros(1, dtype=torch.long))])


def test_own_data_and_loss_decide_what_stays(own):
    """Gradients of a loss that reads one half of the units leave the other half with a score of zero."""
    model = own.Two()
    with torch.no_grad():
        model.box.weight[:, :6] = 0

    def loss(model, inputs, target):
        return (model(*inputs)["box"] - target).square().mean()

    small = shrink(model, inputs(), criterion="taylor_group", batches=[(inputs(8), torch.ones(8, 2))], loss=loss)
    assert torch.equal(small.box.weight, model.box.weight[:, 6:])
    with pytest.raises(ConfigError, match="models of one input tensor"):
        shrink(model, inputs(), criterion="apoz", batches=[(inputs(8), torch.ones(8, 2))])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criterion": "l3"}, ConfigError, "there is no 'l3'"),
        ({"ratio": 1.5}, ConfigError, "ratio: 1.5"),
        ({"ratio": {"9": 0.5}}, ConfigError, "no layer '9'"),
        ({"max_ratio": 0.0}, ConfigError, "max_ratio"),
        ({"criterion": "taylor"}, ConfigError, "needs data"),
        ({"example_inputs": torch.zeros(1, 5, 6, 6)}, SurgeryError, "does not run"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        shrink(sequence(), **({"example_inputs": IMAGE} | arguments))


def test_a_layer_is_never_emptied():
    small = shrink(sequence(), IMAGE, ratio=0.99)
    assert (small[0].out_channels, small[3].out_channels, small[5].out_features) == (1, 1, 4)


def test_only_results_of_shrink_are_saved(tmp_path):
    with pytest.raises(ConfigError, match="not returned by shrink"):
        save_pruned(sequence(), tmp_path)

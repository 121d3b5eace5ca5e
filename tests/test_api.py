"""The Python API: any module, any inputs, and two files that bring it back in a fresh process."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import UserDict

import pytest
import torch
from torch import nn

from prune_cli import load_pruned, report, save_pruned, shrink
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
        ({"ratio": float("nan")}, ConfigError, "ratio: nan is not a fraction"),
        ({"ratio": "half"}, ConfigError, "ratio: 'half' is not a fraction"),
        ({"ratio": {"9": 0.5}}, ConfigError, "^ratio: no layer '9'"),
        ({"ratio": {"0": -0.5}}, ConfigError, "ratio of 0: -0.5"),
        ({"ratio": {"0": 0.5, "3": 0.2}, "scope": "global"}, ConfigError, "^scope=global ranks all layers together"),
        ({"scope": "rows"}, ConfigError, "^scope: .*'layer' or 'global'"),
        ({"normalize": "mean"}, ConfigError, "^normalize: "),
        ({"max_ratio": 0.0}, ConfigError, "max_ratio"),
        ({"max_ratio": "all"}, ConfigError, "max_ratio: 'all'"),
        ({"model": "resnet18"}, ConfigError, "str is no torch.nn.Module"),
        ({"optimizer": "sgd"}, ConfigError, "str is no torch.optim.Optimizer"),
        ({"criterion": 5}, ConfigError, "criterion: 5 is no option"),
        ({"criterion": "taylor"}, ConfigError, "needs data"),
        ({"criterion": "taylor", "batches": [IMAGE]}, ConfigError, "batches: number 0 is no pair"),
        ({"example_inputs": torch.zeros(1, 5, 6, 6)}, SurgeryError, "does not run"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        shrink(**({"model": sequence(), "example_inputs": IMAGE} | arguments))


def test_any_mapping_names_arguments_as_a_tokenizer_returns_one(own):
    class Encoding(UserDict):
        """As transformers.BatchEncoding: attributes that are keys."""

        def __getattr__(self, name):
            try:
                return self.data[name]
            except KeyError as error:
                raise AttributeError from error

    image, extra = inputs()
    small = shrink(own.Two().eval(), Encoding(image=image, extra=extra))
    assert small(image=image, extra=extra)["classes"].shape == (2, 4) and report(small).realised is not None


def test_a_layer_is_never_emptied():
    small = shrink(sequence(), IMAGE, ratio=0.99)
    assert (small[0].out_channels, small[3].out_channels, small[5].out_features) == (1, 1, 4)


def test_only_results_of_shrink_are_saved(tmp_path):
    with pytest.raises(ConfigError, match="not returned by shrink"):
        save_pruned(sequence(), tmp_path)


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_budgets_are_kept_and_what_was_predicted_is_what_is_counted(quantity, scope):
    model = sequence()
    small = shrink(model, IMAGE, budget={quantity: 0.5}, scope=scope)
    found = report(small)
    assert found.dense.params == params(model) and found.predicted.params == params(small)
    assert found.predicted == found.realised
    assert 0.2 < getattr(found.realised, quantity) / getattr(found.dense, quantity) <= 0.5
    assert found.widths["3"] == (8, small[3].out_channels) and f"{found.realised.macs:,}" in str(found)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_hidden_units_of_a_recurrent_layer_go_by_ratio_and_by_budget():
    example = {"x": torch.rand(2, 5, 6)}
    assert shrink(Recurrent(), example).rnn.hidden_size == 8
    small = shrink(Recurrent(), example, budget={"params": 0.5})
    assert report(small).realised == report(small).predicted and params(small) <= 0.5 * params(Recurrent())
    named = shrink(Recurrent(), example, ratio={"rnn.weight_ih_l0": 0.25, "rnn.weight_hh_l0": 0.25})
    assert named.rnn.hidden_size == 12


class Transposed(nn.Module):
    """A linear layer with a weight (in, out), as GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.rand(inputs, outputs)), nn.Parameter(torch.rand(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    """What a block of GPT-2 consists of, and bare parameters behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.up, self.down = (
            nn.Embedding(20, 12),
            nn.LayerNorm(12),
            Transposed(12, 24),
            Transposed(24, 12),
        )
        self.w1, self.w2 = nn.Parameter(torch.rand(12, 16)), nn.Parameter(torch.rand(16, 20))

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return torch.relu(x @ self.w1) @ self.w2


IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_layers_of_classes_unknown_to_torch_and_bare_parameters_are_asked_for():
    model = Block()
    small = shrink(model, IDS)
    assert (small.up.weight.shape, small.down.weight.shape, small.w1.shape) == ((6, 12), (12, 6), (6, 8))
    sizes = model.w1.detach().abs().sum(0)
    assert torch.equal(small.w2, shrink(model, IDS, ratio={"w1": 0.5}).w2)
    assert torch.equal(
        shrink(model, IDS, ratio={"w1": 0.5}).w1, model.w1[:, sizes.argsort(descending=True)[:8].sort()[0]]
    )
    assert shrink(model, IDS, ratio={"up": 0.25}).up.nf == 18
    by_norm = shrink(model, IDS, ratio={"up": 0.5}, criterion="fpgm")
    assert by_norm.up.weight.shape == (12, 12)
    with pytest.raises(ConfigError, match="no layer 'w3'"):
        shrink(model, IDS, ratio={"w3": 0.5})


def test_an_optimizer_goes_on_with_the_small_network():
    model = sequence()
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[3:].parameters(), "lr": 0.1}])
    model(IMAGE).square().sum().backward()
    optimizer.step()
    moment = optimizer.state[model[0].weight]["exp_avg"]
    kept = model[0].weight.detach().abs().sum((1, 2, 3)).argsort(descending=True)[:4].sort().values
    small = shrink(model, IMAGE, optimizer=optimizer)
    assert torch.equal(optimizer.state[small[0].weight]["exp_avg"], moment[kept])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in small.named_parameters() if not name.startswith("1.")
    }
    before = small[3].weight.detach().clone()
    small(IMAGE).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, small[3].weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_optimizers_whose_state_has_other_shapes_go_on_too(make):
    model = sequence()
    optimizer = make(model.parameters())

    def step(network):
        def loss():
            optimizer.zero_grad()
            value = network(IMAGE).square().sum()
            value.backward()
            return value

        return optimizer.step(loss)

    step(model)
    untouched = copy.deepcopy(model.state_dict())
    small = shrink(model, IMAGE, optimizer=optimizer)
    before = copy.deepcopy(small.state_dict())
    step(small)
    step(small)
    assert not torch.equal(before["3.weight"], small[3].weight)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in untouched.items())


class Unknown(nn.Module):
    """Half of it cannot go, as an operator is unknown."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)
        self.c, self.d = nn.Linear(6, inner), nn.Linear(inner, 3)

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.linalg.qr(self.b(torch.linalg.qr(self.a(x))[0]))[0])))


def loud(caplog) -> list[str]:
    """What a user sees."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_what_stays_whole_is_said_aloud_once_with_the_reason(caplog):
    example = torch.rand(20, 6)
    small = shrink(Unknown(8), example)
    (message,) = loud(caplog)
    assert message.startswith(
        "only 8 of 26 channels can go; these stay whole: a.weight and 1 more (linalg_qr in the model"
    )
    assert [one.name for one in report(small).whole] == ["a.weight", "b.weight", "d.weight"]
    assert report(small).notes == (message,) and message in str(report(small))
    caplog.clear()
    assert str(report(shrink(Unknown(8), example, warn=False))) == str(report(small))
    assert not loud(caplog)
    shrink(Unknown(64), example)
    assert not loud(caplog)
    with pytest.raises(ConfigError, match="not returned by shrink"):
        report(Unknown(8))


class Stuck(nn.Module):
    """Nothing of it can go: it reads a number of its data, and a layer did not run."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b, self.other = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(8, 8)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        routes = (self.other, self.a)
        return self.b(routes[min(int(mask.sum().item()), 1)](x))


def test_a_network_of_which_nothing_can_go_says_so_with_a_budget_too(caplog):
    example = {"ids": IDS, "mask": torch.ones(1, 5)}
    small = shrink(Stuck(), example)
    assert params(small) == params(Stuck())
    line = loud(caplog)[-1]
    assert line.startswith("nothing can be removed; these stay whole: ")
    assert (
        "a.weight" in line
        and "looks at values of its data" in line
        and "an example with which every layer runs" in line
    )
    with pytest.raises(ConfigError) as raised:
        shrink(Stuck(), example, budget={"macs": 0.5}, warn=False)
    assert str(raised.value) == f"budget.macs=0.5 cannot be met: {line}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5, "budget": {"macs": 0.5}}, "give one of them"),
        ({"budget": {"flops": 0.5}}, "flops"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "exactly one"),
        ({"budget": {"macs": 1.5}}, "budget.macs"),
        ({"budget": {"macs": 0.001}}, "cannot be met"),
        ({"budget": {"latency_ms": 1.0}, "example_inputs": (IMAGE,)}, "one input tensor"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))])}, "none of its parameters"),
    ],
)
def test_mistakes_about_budgets_and_optimizers(arguments, message):
    with pytest.raises(ConfigError, match=message):
        shrink(sequence(), **({"example_inputs": IMAGE} | arguments))

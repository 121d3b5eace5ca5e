"""The command line as a user meets it: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prune_cli.cli import COMMANDS
from prune_cli.config.locations import GROUPS, description, options
from tests.conftest import ROOT

QUICK = ("recipe=quickstart", "limit_batches=1", "train.epochs=1", "finetune.epochs=1", "latency=false")


def test_help_and_list_never_import_torch_or_hydra(workplace):
    code = (
        "import sys; from prune_cli.cli import dispatch\n"
        "assert dispatch(['--help']) == 0 and dispatch(['list']) == 0\n"
        "loaded = {'torch', 'hydra', 'omegaconf', 'pandas'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert "quickstart" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(prune, command):
    result = prune(command, "--help")
    assert result.code == 0
    assert result.out.startswith("usage: prune " + command)


@pytest.mark.parametrize(("group", "name", "path"), [(g, n, p) for g in GROUPS for n, p in options(g).items()])
def test_every_option_has_a_one_line_description(group, name, path):
    assert 10 < len(description(path)) < 130


def test_list_of_one_group(prune):
    result = prune("list", "criterion")
    assert result.out.splitlines()[0] == "criterion"
    assert any(line.split()[0] == "l1" for line in result.out.splitlines()[1:])
    assert prune("list", "criteron").code == 2


def test_quickstart_leaves_tables_checkpoints_and_log(prune):
    result = prune("run", *QUICK)
    assert result.code == 0, result.err
    assert {path.name for path in result.folder.iterdir()} >= {
        "results.csv", "layers.csv", "history.csv", "run.log", "config.yaml", "train", "prune", "finetune",
    }  # fmt: skip
    rows = result.rows
    assert list(rows.index) == ["train", "prune", "finetune"]
    assert rows.acc1_dense.isna().tolist() == [True, False, False]
    assert rows.loc["finetune", "ratio_prunable"] != rows.loc["finetune", "ratio_prunable"]  # nan: it removes nothing
    assert rows.loc["prune", "ratio_prunable"] == pytest.approx(0.8, abs=1e-4)
    assert rows.flops.tolist() == (2 * rows.macs).tolist()
    assert rows.loc["finetune", "params_nonzero"] <= rows.loc["prune", "params_nonzero"] < rows.loc["train", "params"]
    assert rows.compression.iloc[1] == pytest.approx(rows.params.iloc[0] / rows.params_nonzero.iloc[1])


def test_evaluate_a_run_a_stage_and_a_file(prune):
    run = prune("run", *QUICK)
    whole = prune("evaluate", str(run.folder))
    assert whole.code == 0, whole.err
    correct, total = int(whole.out.split()[0]), int(whole.out.split()[2])
    assert total == 360
    assert 100 * correct / total == pytest.approx(run.rows.loc["finetune", "acc1"])
    stage = prune("evaluate", str(run.folder / "finetune"))
    assert stage.out == whole.out
    assert prune("evaluate", str(run.folder / "finetune/weights.safetensors")).out == whole.out
    alone = run.folder.parent / "alone.safetensors"
    alone.write_bytes((run.folder / "finetune/weights.safetensors").read_bytes())
    file = prune("evaluate", str(alone), "model=lenet5", "dataset=digits")
    assert file.out.split()[:3] == whole.out.split()[:3]
    assert prune("evaluate", str(alone)).code == 2


def test_copy_gives_a_recipe_to_edit(prune, workplace):
    assert prune("copy", "quickstart", "mine").code == 0
    file = workplace / "recipes/recipe/mine.yaml"
    file.write_text(file.read_text().replace("ratio: 0.8", "ratio: 0.25"))
    result = prune("run", "recipe=mine", *QUICK[1:])
    assert result.rows.loc["prune", "ratio_requested"] == pytest.approx(0.25)
    assert prune("copy", "quickstart", "mine").code == 2
    assert prune("copy", "quickstart", "../outside").code == 2
    assert not (workplace / "recipes/outside.yaml").exists()
    assert "mine" in prune("list", "recipe").out
    file.write_text("# cut off\nstages: [train,")
    result = prune("run", "recipe=mine")
    assert result.code == 2 and "mine.yaml" in result.err and len(result.err.strip().splitlines()) == 1, result.err


def test_own_network_and_own_data(prune, workplace, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    (workplace / "own_net.py").write_text(
        "import torch\nfrom torch import nn\nfrom prune_cli.data.arrays import Split, from_arrays\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes: int, width: int = 8):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU())\n"
        "        self.head = nn.Linear(width, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x).mean((2, 3)))\n\n"
        "def data(count: int = 60):\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    make = lambda: Split(torch.randint(0, 255, (count, 2, 6, 6), dtype=torch.uint8, generator=g),\n"
        "                         torch.arange(count) % 3)\n"
        "    return from_arrays('mine', make(), make(), classes=['a', 'b', 'c'], mean=[0.5] * 2, std=[0.5] * 2, val=0.2)\n"
    )
    for group, text in (
        ("model", "_target_: own_net.Net\nwidth: 12\nweights: null\n"),
        ("dataset", "_target_: own_net.data\ncount: 90\n"),
    ):
        folder = workplace / "recipes" / group
        folder.mkdir(parents=True)
        (folder / "mine.yaml").write_text(f"# my own {group}\n{text}")
    result = prune("run", *QUICK, "model=mine", "dataset=mine", "granularity=filter", "granularity.ratio=0.5")
    assert result.code == 0, result.err
    assert result.rows.loc["finetune", "params_nonzero"] < result.rows.loc["train", "params"]
    assert prune("run", *QUICK, "model=mine", "dataset=mine", "model.width=wide").code == 2
    refused = prune("evaluate", str(result.folder))
    assert refused.code == 4
    assert "name it again" in refused.err
    trusted = prune("evaluate", str(result.folder), "model=mine", "dataset=mine", "dataset.count=90", "model.width=12")
    assert trusted.code == 0, trusted.err


def test_show_prints_what_is_known_before_training(prune):
    result = prune("show", "recipe=quickstart", "--estimate")
    assert result.code == 0, result.err
    assert "stage 2  prune" in result.out
    assert "time     about" in result.out
    assert "10 classes of 1 x 8 x 8" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run",), 2, "recipe=quickstart"),
        (("run", "recipe=quickstrat"), 2, "did you mean 'quickstart'"),
        (("runn",), 2, "did you mean 'run'"),
        (("run", *QUICK, "model=resnet2"), 2, "or 'resnet20'"),
        (("run", *QUICK, "trian.epochs=3"), 2, "trian.epochs: unknown key; did you mean 'train.epochs'"),
        (("run", *QUICK, "train.epcohs=3"), 2, "did you mean 'train.epochs'"),
        (("run", *QUICK, "+train.epcohs=3"), 2, "train.epcohs: unknown key; did you mean 'epochs'"),
        (("run", *QUICK, "+sede=3"), 2, "sede: unknown key; did you mean 'seed'"),
        (("run", *QUICK, "train.epochs=many"), 2, "train.epochs"),
        (("run", *QUICK, "seed=x"), 2, "seed"),
        (("run", *QUICK, "stages=[train,prun]"), 2, "did you mean 'prune'"),
        (("run", *QUICK, "stages=[]"), 2, "empty"),
        (("run", *QUICK, "granularity.ratio=1.0"), 2, "granularity.ratio"),
        (("run", *QUICK, "granularity.ratio=-0.1"), 2, "granularity.ratio"),
        (("run", *QUICK, "granularity.normalize=lamp"), 2, "scope=global"),
        (("run", *QUICK, "granularity.rules=[{names:[conv9]}]"), 2, "no layer 'conv9'"),
        (("run", *QUICK, "granularity.rules=[{nmaes:[conv1]}]"), 2, "nmaes"),
        (("run", *QUICK, "granularity.ratio_file=none.yaml"), 2, "none.yaml"),
        (("run", *QUICK, "dataset=cifar10", "dataset.root=nowhere"), 3, "nowhere"),
        (("run", *QUICK, "model.weights=nowhere.pt"), 4, "nowhere.pt"),
        (("run", *QUICK, "device=cuda:99"), 2, "device"),
        (("run", *QUICK, "stages=[train,sparsify,prune]"), 2, "batch norms"),
        (("run", *QUICK, "finetune.fit.select_on=val", "dataset.val=0"), 2, "dataset.val"),
        (("run", *QUICK, "distillation=hinton", "stages=[finetune]"), 2, "teacher"),
        (("run", *QUICK, "distillation=hinton", "distillation.teacher=null"), 2, "learns from a teacher"),
        (("run", *QUICK, "distillation=hinton", "distillation.loss.temperature=0"), 2, "temperature"),
        (("run", *QUICK, "train.optimizer.lr=-1"), 2, "train.optimizer: Invalid learning rate"),
        (("run", *QUICK, "train.epochs=-1"), 2, "train.epochs"),
        (("run", *QUICK, "train.batch_size=0"), 2, "train.batch_size"),
        (("run", *QUICK, "finetune.label_smoothing=1"), 2, "finetune.label_smoothing"),
        (("run", *QUICK, "train.fit.accumulate=0"), 2, "train.fit.accumulate"),
        (("run", *QUICK, "train.fit.clip=0"), 2, "train.fit.clip"),
        (("run", *QUICK, "train.fit.ema=1"), 2, "train.fit.ema"),
        (("run", *QUICK, "model=resnet20", "stages=[train,recalibrate]", "recalibrate.images=0"), 2, "recalibrate.images"),
        (("run", *QUICK, "threads=0"), 2, "threads=0"),
        (("run", *QUICK, "model=5"), 2, "model: options have names"),
        (("run", *QUICK, "train.optimizer=adm"), 2, "train.optimizer=adm: there is no such option; did you mean 'adam'"),
        (("run", *QUICK, "granularity.rules={names: [conv1]}"), 2, "granularity.rules: the value is of another kind"),
        (("run", *QUICK, "seed=${oc.env:NO_SUCH_VARIABLE}"), 2, "NO_SUCH_VARIABLE"),
        (("run", *QUICK, "granularity.rules=[{names:[conv1],exclude:true}]"), 2, "no layer is left to prune"),
        (("evaluate", "nowhere"), 4, "nowhere"),
        (("list", "modle"), 2, "did you mean 'model'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_on_stderr_with_a_code(prune, workplace, arguments, code, message):
    if "device=cuda:99" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
    result = prune(*arguments)
    lines = [line for line in result.err.splitlines() if "warning" not in line.lower()]
    assert result.code == code, result.err
    assert len(lines) == 1, result.err
    assert message in lines[0]
    assert "Traceback" not in result.err
    assert not list(workplace.glob("outputs/store/*")), "nothing may be computed before the mistake is found"


def test_completion_offers_groups_and_options(spawn):
    process = spawn("-sc", "query=bash", COMP_LINE="prune run criterion=l", COMP_POINT="21")
    out, err = process.communicate(timeout=60)
    assert "criterion=l1" in out, err
    assert "criterion=l2" in out


def test_digits_are_read_without_loading_scikit_learn() -> None:
    """It takes seconds to import, in every command."""
    code = (
        "import sys\n"
        "from prune_cli.cli import dispatch\n"
        "dispatch(['show', 'recipe=quickstart'])\n"
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"

"""The sensitivity stage: what it measures is what pruning does, the network is untouched, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch
import yaml

from prune_cli.config.compose import compose
from prune_cli.console import Console
from prune_cli.errors import Interrupted
from prune_cli.files.lines import Lines
from prune_cli.files.weights import read_state_dict
from prune_cli.measure import accuracy
from prune_cli.pipeline.build import build
from prune_cli.pipeline.store import Store
from prune_cli.stages.sensitivity import Point, ratio_file, safe_ratio, zeroed
from prune_cli.stages.sensitivity_plot import curves
from prune_cli.structure.keep import removed
from prune_cli.training.distributed import World
from tests.runs.test_processes import two_processes

NET = (
    "recipe=quickstart", "train.epochs=2", "latency=false", "device=cpu", "stages=[train,sensitivity]",
    "sensitivity.ratios=[0.6,0.3]",
)  # fmt: skip


def points(*accuracies: float, layer: str = "conv", criterion: str = "l1") -> list[Point]:
    return [Point(layer, criterion, 0.1 * n, 0.1 * n, acc1, 1.0) for n, acc1 in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "drop", "expected"),
    [
        ((90, 89.95, 89.95, 80), 0.1, 0.2),
        ((90, 89.95, 89.8, 90), 0.1, 0.1),  # stops at the first violation, also when it gets better again
        ((90, 89.5, 90), 0.5, 0.0),  # strictly below
        ((90, 95, 95), 0.1, 0.2),
    ],
)
def test_largest_safe_ratio(accuracies, drop, expected):
    assert safe_ratio(points(*accuracies), drop) == pytest.approx(expected)


def test_ratio_file_takes_the_least_ratio_of_a_weight_in_two_groups():
    both = points(90, 90, 90, layer="a") + points(90, 90, 0, layer="b")
    text = ratio_file(both, "l1", {"a": ("x.weight", "y.weight"), "b": ("y.weight", "z.weight")}, 0.1)
    assert yaml.safe_load(text) == {
        "prune_ratio": {"x.weight": pytest.approx(0.2), "y.weight": pytest.approx(0.1), "z.weight": pytest.approx(0.1)}
    }


def test_masks_come_off_without_a_trace_also_when_something_fails():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    before_bytes = before.numpy().tobytes()
    with pytest.raises(KeyError), zeroed(model, {"weight": torch.tensor([[True], [False]])}):
        assert not model.weight[1].any()
        assert torch.equal(model.weight[0], before[0])
        raise KeyError
    assert model.weight.detach().numpy().tobytes() == before_bytes


def test_the_same_points_draw_the_same_bytes():
    some = points(90, 80, 70) + points(90, 85, 60, criterion="random") + points(90, 80, 1, layer="fc")
    first, second = curves(some, "net"), curves(some, "net")
    assert first == second
    assert all(word in first for word in ("conv", "fc", "random", "net"))
    assert first != curves(some, "other")


@pytest.mark.parametrize("granularity", ["filter", "element"])
def test_a_line_of_the_table_is_what_pruning_that_layer_gives(prune, granularity):
    result = prune("run", *NET, f"granularity={granularity}", "sensitivity.split=test", "granularity.min_keep=0.5")
    assert result.code == 0, result.err
    folder = result.folder / "sensitivity"
    table = pandas.read_csv(folder / "sensitivity.csv")
    assert list(table) == ["layer", "criterion", "ratio", "ratio_realised", "acc1", "loss"]
    layers = (
        ["conv1", "conv2", "fc1"]
        if granularity == "filter"
        else [f"{n}.weight" for n in ("conv1", "conv2", "fc1", "fc2")]
    )
    assert table.layer.unique().tolist()[:3] == layers[:3]
    assert table[table.layer == table.layer[0]].ratio.tolist() == [0, 0.3, 0.6]
    assert table[table.ratio == 0].acc1.unique().tolist() == [result.rows.acc1["train"]]
    last = table[(table.layer == layers[1]) & (table.ratio == 0.6)].iloc[0]
    assert last.ratio_realised == 0.5  # the floor holds here too

    name = layers[1].removesuffix(".weight")
    alone = prune(
        "run", *NET, f"granularity={granularity}", "stages=[train,prune]", "granularity.ratio=0.5",
        f"+granularity.rules=[{{names:[{name}]}}]",
    )  # fmt: skip
    assert alone.code == 0, alone.err
    assert alone.rows.acc1["prune"] == pytest.approx(last.acc1)
    assert alone.rows.loss["prune"] == pytest.approx(last.loss, rel=1e-5)

    trained, after = (
        read_state_dict(result.folder / stage / "weights.safetensors") for stage in ("train", "sensitivity")
    )
    assert all(torch.equal(trained[key], value) for key, value in after.items())
    assert not (folder / "masks.safetensors").exists()


def test_the_ratio_file_prunes_what_it_says(prune):
    result = prune(
        "run", *NET, "granularity=filter", "sensitivity.drop=30", "sensitivity.calibration.images=20",
        *(f"+criterion@sensitivity.compare.{key}" for key in ("random=random", "taylor=taylor", "kmeans=clustering")),
    )  # fmt: skip
    assert result.code == 0, result.err
    folder = result.folder / "sensitivity"
    assert set(pandas.read_csv(folder / "sensitivity.csv").criterion) == {"l1", "random", "taylor", "kmeans"}
    assert (folder / "sensitivity.svg").is_file()
    assert (folder / "ratios_random.yaml").is_file()
    file = folder / "ratios_l1.yaml"
    ratios = yaml.safe_load(file.read_text())["prune_ratio"]
    assert max(ratios.values()) > 0
    pruned = prune("run", *NET, "granularity=filter", "stages=[train,prune]", f"granularity.ratio_file={file}")
    assert pruned.code == 0, pruned.err
    weights = read_state_dict(folder / "weights.safetensors")
    widths = {name: len(weights[name]) for name in ratios}
    asked = sum(removed(ratios[name], count) for name, count in widths.items())
    assert pruned.rows.ratio_prunable["prune"] == pytest.approx(asked / sum(widths.values()))


def survey(world: World, place: Path, stop_after: int | None = None) -> dict:
    """The stage on a fresh LeNet-5, six points, with what this rank evaluated and wrote; rank 1 alone wants to stop."""
    composed = compose([*NET, "granularity=filter", "stages=[sensitivity]", "dataset=fake"])
    built = build(composed.config, composed.choices, Console(), Store(place))
    done = {"evaluated": 0, "written": 0, "stopped": False, "table": None}

    def evaluate(*arguments):
        done["evaluated"] += 1
        return original_evaluate(*arguments)

    def append(lines, value):
        done["written"] += 1
        original_append(lines, value)

    def interrupted() -> bool:
        return stop_after is not None and world.rank == world.size - 1 and done["evaluated"] >= stop_after

    original_evaluate, original_append = accuracy.accuracy, Lines.append
    accuracy.accuracy, Lines.append = evaluate, append
    state = built.state.evolve(world=world, slot=Store(place).slot("k"), stage="sensitivity", interrupted=interrupted)
    try:
        after = built.steps[0].run(state)
        done["table"] = after.outcome.files["sensitivity.csv"]
    except Interrupted:
        done["stopped"] = True
    finally:
        accuracy.accuracy, Lines.append = original_evaluate, original_append
    return done


def test_every_point_is_written_once(workplace):
    done = survey(World(), workplace)
    assert done["evaluated"] == done["written"] == 1 + 3 * 2  # the network as it is, three layers at two ratios
    again = survey(World(), workplace)
    assert again == {**done, "evaluated": 0, "written": 0}


@pytest.mark.parametrize("torn", [b"", b'0123456789abcdef {"layer"', b"0123456789abcdef {}\n"])
def test_it_goes_on_where_it_was_stopped_also_behind_a_torn_line(workplace, torn):
    whole = survey(World(), workplace / "whole")
    assert survey(World(), workplace / "cut", stop_after=4)["stopped"]
    (file,) = workplace.glob("cut/k.partial/points")
    with file.open("ab") as lines:
        lines.write(torn)
    rest = survey(World(), workplace / "cut")
    assert rest["evaluated"] == rest["written"] == 7 - 4
    assert rest["table"] == whole["table"]
    assert len(Lines(file).read()) == 7


@pytest.mark.slow
def test_two_processes_share_the_points_and_stop_together(tmp_path):
    """Rank 1 alone is told to stop after its second point; the same command goes on, and no point is there twice."""
    two_processes(
        tmp_path,
        "tests.stages.test_sensitivity",
        "survey",
        "    from pathlib import Path\n"
        f"    place = Path({str(tmp_path)!r})\n"
        "    found = [survey(world, place, stop_after=2), survey(world, place)]\n"
        "    (place / f'{world.rank}.json').write_text(json.dumps(found))\n",
    )
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert [(first["stopped"], first["evaluated"], first["written"]) for first, _ in ranks] == [
        (True, 2, 4),
        (True, 2, 0),
    ]
    assert [(second["evaluated"], second["written"]) for _, second in ranks] == [(2, 3), (1, 0)]
    alone = survey(World(), tmp_path / "alone")
    assert [second["table"] for _, second in ranks] == [alone["table"]] * 2


def test_a_killed_run_takes_its_points_up_again(prune, monkeypatch):
    def counting(*arguments):
        counting.calls += 1
        if counting.calls == counting.stop_at:
            raise KeyboardInterrupt
        return original(*arguments)

    original = accuracy.accuracy
    assert prune("run", *NET, "granularity=filter", "stages=[train]").code == 0
    monkeypatch.setattr(accuracy, "accuracy", counting)
    counting.calls, counting.stop_at = 0, 5
    assert prune("run", *NET, "granularity=filter").code != 0
    counting.calls, counting.stop_at = 0, 0
    result = prune("run", *NET, "granularity=filter")
    assert result.code == 0, result.err
    # The three of seven points that were missing, then the stage's own two accuracies.
    assert counting.calls == 7 - 4 + 2
    assert len(pandas.read_csv(result.folder / "sensitivity" / "sensitivity.csv")) == 9


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("dataset.val=0",), "sensitivity.split=test"),
        (("sensitivity.ratios=[0.5,1.5]",), "sensitivity.ratios"),
        (("+sensitivity.compare.l1.scor=1",), "sensitivity.compare.l1"),
        (("sensitivity.drop=0",), "sensitivity.drop"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_training(prune, keys, expected):
    result = prune("run", *NET, *keys)
    assert result.code == 2
    assert expected in result.err
    assert len(result.err.strip().splitlines()) == 1

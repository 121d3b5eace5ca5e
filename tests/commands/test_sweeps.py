"""A sweep as a whole, and what a run that never began leaves: one table and folder, the same place again, nothing."""

from __future__ import annotations

import json

import pandas

QUICK = ("recipe=quickstart", "limit_batches=1", "stages=[train,prune]")


def test_a_sweep_ends_with_one_table_and_its_own_folder(prune, workplace):
    result = prune("run", "-m", *QUICK, "criterion=l1,random", "granularity.ratio=0.5")
    assert result.code == 0, result.err
    assert result.folder.parent.name == "multirun" and (result.folder / "results.csv").is_file()
    table = [line for line in result.out.splitlines() if "│" in line]
    assert len(table) == 2 and "l1" in table[0] and "random" in table[1]
    assert "granularity.ratio" not in result.out, "it is the same in all"
    assert "job 1: recipe=quickstart" in result.err
    assert result.err.splitlines()[-1].endswith(f"prune evaluate {result.folder / '1'}")
    assert set(pandas.read_csv(result.folder / "results.csv").job) == {0, 1}


def test_the_same_sweep_goes_on_in_its_place_and_another_is_refused(prune, workplace):
    first = prune("run", "-m", "--into", "outputs/mine", *QUICK, "criterion=l1,random")
    assert first.code == 0, first.err
    (workplace / "outputs/mine/1/results.csv").unlink()
    again = prune("run", "-m", *QUICK, "criterion=l1,random", "--into=outputs/mine")
    assert again.code == 0 and again.folder.resolve() == (workplace / "outputs/mine").resolve(), again.err
    assert again.err.count("taken from the store") == 4
    assert (workplace / "outputs/mine/1/results.csv").is_file()
    other = prune("run", "-m", "--into", "outputs/mine", *QUICK, "criterion=l1,l2")
    assert other.code == 2 and "there lies another sweep" in other.err
    (workplace / "outputs/mine/sweep.json").write_text("[")
    assert prune("run", "-m", "--into", "outputs/mine", *QUICK, "criterion=l1,l2").code == 2
    assert prune("run", *QUICK, "--into").code == 2


def test_a_run_can_be_put_somewhere(prune, workplace):
    place = workplace / "a=b, [c]'s"
    result = prune("run", *QUICK, "--into", str(place))
    assert result.code == 0 and (place / "results.csv").is_file(), result.err
    evaluate, export = result.err.splitlines()[-2:]
    assert "next: prune evaluate" in evaluate and "prune export" in export


def test_a_job_that_fails_hides_no_other(prune, workplace):
    result = prune("run", "-m", *QUICK, "granularity.ratio=0.5,1.5")
    assert result.code == 2 and "granularity.ratio" in result.err
    assert (result.folder / "results.csv").is_file() and not (result.folder / "1").exists()


def test_what_fails_before_anything_is_computed_leaves_no_folder(prune, workplace):
    for words in (
        ("run", *QUICK, "dataset=cifar10", "dataset.root=nowhere"),
        ("run", *QUICK, "granularity.ratio=2"),
        ("run", *QUICK, "train.nothing=2"),
        ("run", "-m", *QUICK, "granularity.ratio=2,3"),
        ("run", "-m", *QUICK, "train.nothing=2,3"),
        ("run", "-m", *QUICK, "dataset=cifar10,cifar100", "dataset.root=nowhere"),
    ):
        result = prune(*words)
        assert result.code in (2, 3), result.err
        assert not (workplace / "outputs").exists(), words


def test_what_fails_later_leaves_its_log(prune, workplace):
    result = prune("run", *QUICK, "train.optimizer.lr=1e38")
    assert result.code == 5
    (log,) = workplace.glob("outputs/quickstart/*/run.log")
    assert "train: starting" in log.read_text() and (log.parent / "config.yaml").is_file()


def test_a_folder_with_results_survives_a_mistake(prune, workplace):
    assert prune("run", *QUICK, "--into", "here").code == 0
    before = sorted(path.name for path in (workplace / "here").iterdir())
    assert prune("run", *QUICK, "--into", "here", "granularity.ratio=2").code == 2
    assert sorted(path.name for path in (workplace / "here").iterdir()) == before
    assert json.loads((workplace / "here/choices.json").read_text())["recipe"] == "quickstart"


def test_the_table_says_what_it_counts(prune):
    untimed = prune("run", *QUICK).out
    result = prune("run", *QUICK, "latency=true")
    heads = "\n".join(result.out.splitlines()[:4])
    assert "nonzero" in heads and "batch 1" in heads and "points" in heads
    assert "batch 1" not in untimed and "nonzero" in untimed

"""A fuzz of what a user can type: nothing ends in a traceback or in "unexpected"; what is refused is one line with a code."""

from __future__ import annotations

import collections
import random
import sys

import pytest

from prune_cli.config.compose import compose
from tests.config.test_overrides import leaves

VALUES = (
    "null", "true", "-1", "0", "1", "0.5", "1.5", "1e38", "1e400", "nan", "-inf", "2147483648", "1000000000000", "-1e30", "''", "a",
    "[]", "[1,2]", "[null]", "{}", "{a: 1}", "[[1]]", "/dev/null", "'a b'", "é", "'\\x00'", "None", "${seed}", "${nope}", "[{}]",
)  # fmt: skip
RECIPES = (
    "quickstart",
    "digits_filter",
    "lenet_digits_irre",
    "digits_stripe_skeleton",
    "lenet_digits_deep_compression",
)
WORDS = (
    "device=meta", "device=xla", "device=null", "device=cuda:99", "device=cpu:1", "device=''", "device=[cpu]", "device=hpu:0",
    "device=vulkan", "device=mps:3", "device=privateuseone", "device=cpu:", "~model", "~dataset", "~criterion", "~seed", "~stages",
    "~train", "~train.epochs", "~train.optimizer", "~train.optimizer.lr", "~dataset._target_", "~model._target_", "~granularity.units",
    "~device", "~limit_batches", "~latency", "~granularity", "~hydra", "~hydra.run", "~nothing", "dataset.image_size=100000",
    "dataset.image_size=1000000000000", "threads=100000", "threads=-1", "train.epochs=true", "dataset.val=1.0", "dataset.val=true",
    "a b", "=", "==", "model=", "--nonsense", "-x", "@", "@a=1", "a@=1", ".=1", "a.=1", ".a=1", "a..b=1", "stages=train",
    "stages={a:1}", "stages=[1]", "stages=[[train]]", "stages=[train,null]", "criterion=l1,l2", "criterion=[l1]", "criterion={a: 1}",
    "model={_target_: os.system}", "model._target_=os.getcwd", "model._target_=torch.nn.Linear", "dataset._target_=builtins.dict",
    "dataset._target_=torch.zeros", "train._target_=builtins.print", "train.optimizer._target_=builtins.dict",
    "train.lr_schedule._target_=builtins.len", "criterion.score._target_=builtins.max", "granularity.units._target_=builtins.object",
    "schedule._target_=builtins.iter", "train._partial_=true", "model._partial_=true", "dataset._partial_=true",
    "granularity.rules=[{}]", "granularity.rules=[{types: [Nothing]}]", "granularity.rules=[{names_re: '('}]", "granularity.rules=[1]",
    "granularity.ratio_file=/dev/null", "granularity.ratio_file=.", "model.weights=/dev/null", "model.weights=.", "train.init=cfg:/dev/null",
    "train.init=cfg:.", "train.init=x", "train.remember=[x]", "train.remember=[-1]", "train.remember=[1e30]", "train.remember=[999ep]",
    "hydra.run.dir=/dev/null", "hydra=1", "hydra/launcher=x", "+x=1", "++seed=3", "+train.epochs=3", "+stages.0=train", "seed=99999999999999999999",
    "seed=-5", "seed=1.5", "tensorboard=1", "latency=maybe", "deterministic=yes please", "limit_batches=0", "limit_batches=1.5",
    "fit=default", "optimizer=adam", "train.optimizer=nonsuch", "prune.criterion=nonsuch", "prune.granularity=5", "prune.criterion=[l1]",
    "prune.granularity={a: 1}", "prune.nothing.x=1", "nothing.granularity.ratio=1", "recipe=quickstart,digits_filter", "recipe=../x",
    "dataset=fake dataset.shape=[1,0,8]", "dataset=fake dataset.shape=[3,100000,100000]", "dataset=fake dataset.num_classes=100000000",
    "dataset=fake dataset.train=0", "dataset=fake dataset.train=1000000000000", "model=resnet20 model.depth=7", "model=wrn_16_1 model.width=1000000",
    "model=torchvision model.name=nonsuch", "model=torchvision model.pretrained=nonsuch", "model=vgg16", "x" * 3000, "x" * 3000 + "=1",
    "model=" + "y" * 3000, "train.optimizer.betas=[1]", "optimizer@train.optimizer=adam train.optimizer.betas=[2,3]",
    "optimizer@train.optimizer=adam train.optimizer.betas=[0.9]", "lr_schedule@train.lr_schedule=one_cycle train.lr_schedule.peak=1",
    "lr_schedule@train.lr_schedule=multi_step train.lr_schedule.milestones=[nan]", "dataset.mean=[0.5]", "dataset.mean=[0] dataset.std=[0]",
)  # fmt: skip


def typed() -> list[tuple[str, ...]]:
    """The words above, and for a fifth of all keys of some recipes three values each, drawn once and for all."""
    chance, found = random.Random(0), []
    for word in WORDS:
        parts = word.split(" ")
        found.append(("recipe=quickstart", *(parts if all("=" in part for part in parts) else [word])))
    for recipe in RECIPES:
        keys = sorted(path for path, _ in leaves(compose([f"recipe={recipe}"]).config))
        found += [
            (f"recipe={recipe}", f"{key}={value}")
            for key in chance.sample(keys, len(keys) // 5)
            for value in chance.sample(VALUES, 3)
        ]
    return found


@pytest.mark.slow
def test_nothing_that_can_be_typed_is_unexpected(prune, workplace):
    codes: collections.Counter[int] = collections.Counter()
    wrong = []
    for words in typed():
        result = prune("run", "limit_batches=1", *words)
        codes[result.code] += 1
        lines = [line for line in result.err.splitlines() if "error:" in line]
        told = result.code == 0 or len(lines) == 1
        if (
            result.code == 1
            or not told
            or "nexpected" in result.err
            or "Traceback" in result.err
            or "_own_" in result.err
        ):
            wrong.append((words, result.code, result.err[-300:]))
    sys.stdout.write(f"{codes.total()} commands: {dict(codes)}\n")
    assert codes.total() >= 400
    assert not wrong, "\n".join(map(str, wrong))

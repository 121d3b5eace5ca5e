"""Which networks prune, and exactly: one row per model, as CSV and as text.

Every family of every model loses half of its units (random scores), the final classifier stays. The small network must
run, train one step, equal the masked dense network (norms over channels see the kept ones), and hold exactly the
parameters that the plan's arithmetic predicts. The peer (torch-pruning) runs in its own process with a time limit.

    python scripts/coverage.py --models 'resnet.*' --out outputs/coverage.csv --peer --limit 120
    python scripts/coverage.py --out outputs/coverage.csv --peer       # everything, an hour
    python scripts/coverage.py --out outputs/coverage_double.csv --double

Times are CPU seconds of one thread. Models that are in the CSV already are not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import math
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prune_cli.structure import follow, reference, surgery
from prune_cli.structure.keep import lowest_units

TIMM = (
    # convnets
    "convnext_atto",
    "resnetv2_50",
    "res2net50_14w_8s",
    "resnest14d",
    "skresnet18",
    "ecaresnet26t",
    "ghostnet_100",
    "dla34",
    "hrnet_w18_small",
    "vovnet39a",
    "cspresnet50",
    "darknet53",
    "rexnet_100",
    "mobilenetv4_conv_small",
    "tinynet_e",
    "repvgg_a0",
    "dpn68",
    "xception41",
    "inception_next_atto",
    "convmixer_768_32",
    "lcnet_050",
    "hardcorenas_a",
    "starnet_s1",
    "regnetz_b16",
    "hgnetv2_b0",
    "poolformer_s12",
    "gernet_s",
    "mixnet_s",
    "nfnet_l0",
    # transformers, mixers and hybrids
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "gmlp_ti16_224",
    "efficientformer_l1",
    "cait_xxs24_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "mobilevit_xxs",
    "edgenext_xx_small",
    "pvt_v2_b0",
    "xcit_nano_12_p16_224",
    "levit_128s",
    "fastvit_t8",
    "visformer_tiny",
    "twins_pcpvt_small",
    "coatnet_nano_rw_224",
    "davit_tiny",
    "focalnet_tiny_srf",
    "tiny_vit_5m_224",
    "crossvit_tiny_240",
    "efficientvit_b0",
    "mambaout_femto",
)
SIZES = {"inception_v3": 299, "maxvit_t": 224}
COLUMNS = (
    "source",
    "model",
    "params",
    "params_kept",
    "share_kept",
    "predicted",
    "macs_share",
    "error",
    "error_kind",
    "trains",
    "families",
    "norm_units",
    "analyse_s",
    "shrink_s",
    "forward_s",
    "warnings",
    "verdict",
    "peer",
    "peer_share",
    "peer_s",
)


def names(pattern: str) -> list[tuple[str, str]]:
    """(source, model) pairs whose model name matches the pattern entirely."""
    import torchvision

    found = []
    for source, module in (
        ("classification", torchvision.models),
        ("segmentation", torchvision.models.segmentation),
        ("video", torchvision.models.video),
    ):
        listed = torchvision.models.list_models(module=module)
        if source == "classification":
            listed = [n for n in listed if not n.startswith("quantized_")]
        found += [(source, name) for name in listed]
    found += [("timm", name) for name in TIMM]
    return [(source, name) for source, name in found if re.fullmatch(pattern, name) or re.fullmatch(pattern, source)]


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Skips the initialisers: `randomise` fills the weights."""
    saved = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
    try:
        for name in saved:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


def build(source: str, name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and an input of a small legal size."""
    size = SIZES.get(name, 64)
    with uninitialised():
        if source == "timm":
            import timm

            model = timm.create_model(name)
            size = model.default_cfg["input_size"][-1]
        else:
            import torchvision

            options: dict[str, Any] = {"weights": None}
            if name.startswith("vit_"):
                size = 56 if "14" in name else 64
                options["image_size"] = size
            if name in ("googlenet", "inception_v3"):
                options["init_weights"] = False
            if source == "segmentation":
                options |= {"weights_backbone": None}
                if not name.startswith("lraspp"):
                    options["aux_loss"] = True
            model = torchvision.models.get_model(name, **options)
    randomise(model)
    if source == "video":
        shape = (1, 3, 16, 224, 224) if name.startswith(("mvit", "swin3d")) else (1, 3, 8, 64, 64)
        if name.startswith("s3d"):
            shape = (1, 3, 16, 224, 224)
        return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model, torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> None:
    """Fills weights, norm parameters, biases and running statistics with values that are far from special."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                low, high = (0.5, 1.0) if name.endswith("weight") else (-0.25, 0.25)
                parameter.uniform_(low, high, generator=generator)
            else:
                fan = max(math.prod(parameter.shape[1:]), 1)
                parameter.uniform_(-1.7 / math.sqrt(fan), 1.7 / math.sqrt(fan), generator=generator)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)


def trains(model: nn.Module, example: Tensor) -> bool:
    """One forward, backward and SGD step in training mode on two images."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    batch = torch.cat([example, example.flip(-1)])
    outputs = [t for t in tree_leaves(_open(model(batch))) if isinstance(t, Tensor) and t.is_floating_point()]
    sum(t.square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    optimizer.step()
    return any(p.grad is not None for p in model.parameters())


def _open(output: Any) -> Any:
    return dict(output.items()) if hasattr(output, "items") else output


def examine(source: str, name: str, double: bool) -> dict[str, Any]:
    """Prunes one model and measures; the row without the peer's columns."""
    row: dict[str, Any] = {"source": source, "model": name, "verdict": "ok"}
    model, example = build(source, name)
    model.eval()
    if double:
        model, example = model.double(), example.double()
    start = time.process_time()
    with torch.no_grad():
        model(example)
    row["forward_s"] = round(time.process_time() - start, 4)
    start = time.process_time()
    plan = follow.analyse(model, example)
    row["analyse_s"] = round(time.process_time() - start, 4)
    keep = lowest_units(plan, np.random.default_rng(0).random(plan.size), 0.5)
    start = time.process_time()
    shrunk = surgery.remove_units(model, plan, keep)
    row["shrink_s"] = round(time.process_time() - start, 4)
    dense, cost = shrunk.plan.count(shrunk.plan.everything()), shrunk.plan.count(shrunk.keep)
    kept = sum(p.numel() for p in shrunk.model.parameters())
    total = sum(p.numel() for p in model.parameters())
    error = reference.difference(model, shrunk, example)
    row |= {
        "params": total,
        "params_kept": kept,
        "share_kept": round(kept / total, 4),
        "predicted": cost.params,
        "macs_share": round(cost.macs / dense.macs, 4),
        "error": f"{error:.1e}",
        "error_kind": ("float64" if double else "float32") + (" kept norms" if plan.norms else ""),
        "families": len(plan.families),
        "norm_units": len(plan.norms),
        "warnings": len(shrunk.plan.warnings),
    }
    logging.info("%s: %s", name, shrunk.plan.warnings)
    if not double:
        del model
        row["trains"] = trains(shrunk.model, example)
    if cost.params != kept or dense.params != total:
        row["verdict"] = "arithmetic differs"
    elif not error <= (1e-10 if double else 1e-5):
        row["verdict"] = "outputs differ"
    elif kept == total:
        row["verdict"] = "nothing pruned"
    return row


def peer_one(source: str, name: str) -> dict[str, Any]:
    """The peer on one model: half of every layer by L2, classifier kept."""
    import torch_pruning

    model, example = build(source, name)
    model.eval()
    total = sum(p.numel() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    classifiers = [m for m in layers if getattr(m, "out_features", getattr(m, "out_channels", 0)) in (1000, 21, 400)]
    start = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifiers,
    )
    pruner.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        model(example)
    kept = sum(p.numel() for p in model.parameters())
    return {"peer": "runs", "peer_share": round(kept / total, 4), "peer_s": round(seconds, 2)}


def peer(source: str, name: str, limit: float) -> dict[str, Any]:
    """The peer in its own process, which gets so many CPU seconds: other load on the machine matters little."""
    command = [sys.executable, __file__, "--limit", str(limit), "--peer-one", source, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"peer": f"over {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return {"peer": "fails: " + last[:80]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=".*", help="regular expression on the model's name or source")
    parser.add_argument("--out", type=Path, default=Path("outputs/coverage.csv"), help="CSV; a .txt is put beside it")
    parser.add_argument("--double", action="store_true", help="float64, limit 1e-10, no training step")
    parser.add_argument("--peer", action="store_true", help="run torch-pruning as well")
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds per model for the peer")
    parser.add_argument("--peer-one", nargs=2, metavar=("SOURCE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING)
    if args.peer_one:
        resource.setrlimit(resource.RLIMIT_CPU, (int(args.limit), int(args.limit) + 5))
        print(json.dumps(peer_one(*args.peer_one)))
        return
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.exists():
        with args.out.open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    known = {(row["source"], row["model"]) for row in rows}
    for source, name in names(args.models):
        if (source, name) in known:
            continue
        try:
            row = examine(source, name, args.double)
        except Exception as error:
            row = {
                "source": source,
                "model": name,
                "verdict": f"{type(error).__name__}: {error}".splitlines()[0][:160],
            }
        if args.peer:
            row |= peer(source, name, args.limit)
        rows.append(row)
        print(line(row), flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    good = sum(row["verdict"] == "ok" for row in rows)
    summary = f"{good} of {len(rows)} prune and equal the masked network"
    print(summary)
    args.out.with_suffix(".txt").write_text("\n".join([*map(line, rows), summary]) + "\n")


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return (
        f"{row['model']:34s} kept {row.get('share_kept', '-')!s:7s} error {row.get('error', '-')!s:8s} "
        f"trains {row.get('trains', '-')!s:5s} analyse {row.get('analyse_s', '-')!s:8s} "
        f"shrink {row.get('shrink_s', '-')!s:8s} forward {row.get('forward_s', '-')!s:8s} "
        f"warnings {row.get('warnings', '-')!s:3s} {row['verdict']}"
        + (f" | peer {row['peer']} {row.get('peer_share', '')} {row.get('peer_s', '')}" if "peer" in row else "")
    )


if __name__ == "__main__":
    main()

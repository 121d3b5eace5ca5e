"""Lines of the tables: what is measured of a stage's result, and the row of results.csv made from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from prune_cli import masks as masking
from prune_cli import measure
from prune_cli.artifacts import Row
from prune_cli.granularities.latency import layer_times
from prune_cli.state import State

LATENCIES = ("latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b64", "latency_p95_ms_b64", "throughput_b64")


def measure_stage(state: State, seconds: float, latency: bool) -> dict[str, Any]:
    """Everything a row of the tables needs that does not depend on other stages."""
    model = state.model.eval()
    test = measure.accuracy(model, state.data.evaluation("test", 500))
    val = measure.accuracy(model, state.data.evaluation("val", 500)).acc1 if state.data.has_val else None
    cost = measure.cost(model, state.example_inputs(), state.masks)
    removed = masking.zeros(state.masks, model)
    times = layer_times(model, state.example_inputs(), [layer.name for layer in cost.layers]) if latency else {}
    facts = {
        "acc1": test.acc1,
        "acc5": test.acc5,
        "loss": test.loss,
        "acc1_val": val,
        "params": cost.params,
        "params_nonzero": cost.params - removed,
        "macs": cost.macs,
        "macs_nonzero": cost.macs_nonzero,
        "bytes": cost.bytes,
        "seconds": seconds,
        "device": describe(state.device),
        "layers": [_layer(layer, times.get(layer.name)) for layer in cost.layers],
        **{key: value for key, value in asdict(state.outcome).items() if key != "files"},
    }
    return facts | (latencies(state) if latency else dict.fromkeys(LATENCIES))


def latencies(state: State) -> dict[str, float]:
    """Times forward passes at batch 1 and 64, about a second each on a network of any size."""
    found = {}
    for batch in (1, 64):
        images = torch.zeros(batch, *state.data.shape, device=state.device)
        timed = functools.partial(measure.latency, state.model, images, state.device, threads=torch.get_num_threads())
        once = timed(warmup=1, repeats=1).median_ms
        repeats = max(3, min(50, int(1000 / once)))
        latency = timed(warmup=min(5, repeats), repeats=repeats)
        found[f"latency_ms_b{batch}"], found[f"latency_p95_ms_b{batch}"] = latency.median_ms, latency.p95_ms
    return found | {"throughput_b64": latency.throughput}


def _layer(layer: measure.LayerCost, milliseconds: float | None) -> dict[str, Any]:
    """A line of layers.csv; the time is of one image on one thread, None where it was not measured."""
    sizes = {
        "weight_shape": "x".join(map(str, layer.weight_shape or ())),
        "output_shape": "x".join(map(str, layer.output_shape)),
    }
    return (
        {"layer": layer.name, "sparsity": layer.sparsity, "latency_ms_b1": milliseconds}
        | {key: value for key, value in asdict(layer).items() if key != "name"}
        | sizes
    )


def describe(device: torch.device) -> str:
    """The device as tables name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} x{torch.get_num_threads()}" if device.type == "cpu" else device.type


def slower(facts: Mapping[str, Any], dense: Mapping[str, Any] | None) -> bool | None:
    """Whether a network that was made smaller takes longer than the dense one did, at either batch size.

    A twentieth longer may be noise and does not count.
    """
    if dense is None or facts["params"] >= dense["params"]:
        return None
    pairs = [(facts[name], dense[name]) for name in ("latency_ms_b1", "latency_ms_b64")]
    return any(now > 1.05 * before for now, before in pairs) if all(None not in pair for pair in pairs) else None


def row(
    stage: str,
    choices: Mapping[str, str | None],
    facts: Mapping[str, Any],
    labels: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    key: str,
) -> Row:
    params = (dense or facts)["params"]
    nonzero = facts["params_nonzero"]
    return Row(
        recipe=labels["recipe"],
        stage=stage,
        seed=labels["seed"],
        model=labels["model"],
        dataset=labels["dataset"],
        criterion=choices["criterion"],
        granularity=choices["granularity"],
        schedule=choices["schedule"],
        distillation=choices["distillation"],
        ratio_requested=facts["ratio_requested"],
        ratio_prunable=facts["ratio_prunable"],
        ratio_channels=facts.get("ratio_channels"),
        ratio_total=1 - nonzero / params,
        sparsity=1 - nonzero / facts["params"],
        params=facts["params"],
        params_nonzero=nonzero,
        macs=facts["macs"],
        macs_nonzero=facts["macs_nonzero"],
        flops=2 * facts["macs"],
        bytes=facts["bytes"],
        acc1=facts["acc1"],
        acc5=facts["acc5"],
        loss=facts["loss"],
        acc1_val=facts["acc1_val"],
        select_on=facts["select_on"],
        acc1_dense=dense["acc1"] if dense else None,
        acc1_delta=facts["acc1"] - dense["acc1"] if dense and dense["acc1"] is not None else None,
        compression=params / max(nonzero, 1),
        speedup_macs=(dense or facts)["macs"] / max(facts["macs"], 1),
        **{name: facts[name] for name in LATENCIES},
        slower_than_dense=slower(facts, dense),
        epochs=facts["epochs"],
        seconds=facts["seconds"],
        device=facts["device"],
        dense_sha256=dense["weights_sha256"] if dense else None,
        key=key,
    )

"""Lines of the tables: what is measured of a stage's result, and the row of results.csv made from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from prune_cli import masks as masking
from prune_cli.compression.codec import Sizes
from prune_cli.files.artifacts import Row
from prune_cli.layers.replacing import replaced
from prune_cli.measure import accuracy, semi_structured, storage
from prune_cli.measure import cost as measure
from prune_cli.measure import latency as timing
from prune_cli.measure.layer_times import layer_times
from prune_cli.measure.storage import MaskFormat, Storage
from prune_cli.pipeline.state import State

CONV = "Conv"  # in the class name of every convolution
STAGES = ("bytes_pruned", "bytes_shared", "bytes_huffman", "bytes_entropy")
LATENCIES = ("latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b64", "latency_p95_ms_b64", "throughput_b64")


def measure_stage(state: State, seconds: float, latency: bool) -> dict[str, Any]:
    """Everything a row of the tables needs that does not depend on other stages."""
    model = state.model.eval()
    test = accuracy.accuracy(model, state.data.evaluation("test", 500))
    val = accuracy.accuracy(model, state.data.evaluation("val", 500)).acc1 if state.data.has_val else None
    cost = measure.cost(model, state.example_inputs(), state.masks)
    removed = masking.zeros(state.masks, model)
    times = layer_times(model, state.example_inputs(), [layer.name for layer in cost.layers]) if latency else {}
    stored = storage_of(state)
    halved = _semi_structured(state) if latency else {}
    facts = {
        "acc1": test.acc1,
        "acc5": test.acc5,
        "loss": test.loss,
        "acc1_val": val,
        "params": cost.params,
        "params_nonzero": cost.params - removed,
        "conv_weights": sum(layer.weights for layer in cost.layers if CONV in layer.kind),
        "conv_weights_nonzero": sum(layer.weights_nonzero for layer in cost.layers if CONV in layer.kind),
        "macs": cost.macs,
        "macs_nonzero": cost.macs_nonzero,
        "bytes": cost.bytes,
        "bytes_stored": sum(entry["bytes_stored"] for entry in stored.values()),
        **{key: sum(entry[key] for entry in stored.values()) for key in STAGES if state.outcome.coded},
        "seconds": seconds,
        "device": describe(state.device),
        "layers": [
            _layer(layer, times.get(layer.name))
            | _of_layer(layer.name, stored, bool(state.outcome.coded))
            | halved.get(layer.name, {})
            for layer in cost.layers
        ],
        **{key: value for key, value in asdict(state.outcome).items() if key not in ("files", "coded")},
    }
    return facts | (latencies(state) if latency else dict.fromkeys(LATENCIES))


def latencies(state: State) -> dict[str, float]:
    """Times forward passes at batch 1 and 64, about a second each on a network of any size."""
    found = {}
    for batch in (1, 64):
        images = torch.zeros(batch, *state.data.shape, device=state.device)
        timed = functools.partial(timing.latency, state.model, images, state.device, threads=torch.get_num_threads())
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


def storage_of(state: State) -> dict[str, dict[str, Any]]:
    """What every parameter and buffer costs to store, tied ones once, by name.

    A masked parameter costs what its form needs, anything else its values. Right after weight sharing it is what the
    compressed file holds: codes of what is shared, the values of the rest; and the bytes after each stage beside it.
    """
    found: dict[str, dict[str, Any]] = {}
    coded, kept = state.outcome.coded, state.model.state_dict().keys()
    buffers = {name: value for name, value in state.model.named_buffers() if name in kept}
    special = {
        f"{layer}.{name}": form
        for layer, module, kind in replaced(state.model)
        for name, form in kind.stored(module).items()
    }
    for name, tensor in {**dict(state.model.named_parameters()), **buffers}.items():
        sizes, mask, bits = coded.get(name), state.masks.get(name), 8 * tensor.element_size()
        if sizes is not None:
            kind, cost = "shared", Storage(sizes.values, indices=sizes.indices, codebooks=sizes.codebook)
        elif mask is not None and not coded:
            kind, cost = storage.stored(state.forms.get(name, MaskFormat()), mask, tensor.shape, bits)
        elif name in special:
            form, bitmap = special[name].format, special[name].bits
            kind, cost = form, storage.dense(tensor.shape, bits) if bitmap is None else storage.positions(bitmap)
        else:
            kind, cost = "dense", storage.dense(tensor.shape, bits)
        stages = sizes or Sizes.uncoded(cost.total)
        found[name] = {
            "format": kind,
            "bytes": tensor.numel() * tensor.element_size(),
            **{f"bytes_{key}": value for key, value in asdict(cost).items()},
            "bytes_stored": cost.total,
            **{key: getattr(stages, key.removeprefix("bytes_")) for key in STAGES},
        }
    return found


def _semi_structured(state: State) -> dict[str, dict[str, Any]]:
    """Columns of the layers with 2:4 weights; see `semi_structured.Timing`."""
    images, _ = next(iter(state.data.calibration(64, 64)))
    found = semi_structured.timings(state.model, state.masks, images)
    return {name: asdict(timing) for name, timing in found.items()}


def _of_layer(layer: str, stored: Mapping[str, Mapping[str, Any]], coded: bool) -> dict[str, Any]:
    """The sums over what a layer owns itself, and the format of its weight."""
    own = {name.rpartition(".")[2]: entry for name, entry in stored.items() if name.rpartition(".")[0] == layer}
    columns = [key for entry in own.values() for key in entry if key != "format" and (coded or key not in STAGES)]
    sums = {key: sum(entry[key] for entry in own.values()) for key in dict.fromkeys(columns)}
    weight = own.get("weight")
    return {"format": weight and weight["format"]} | sums


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
    of_convs, conv_left = (dense or facts).get("conv_weights"), facts.get("conv_weights_nonzero")
    nonzero, stored = facts["params_nonzero"], facts.get("bytes_stored")
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
        ratio_conv=1 - conv_left / of_convs if of_convs and conv_left is not None else None,
        sparsity=1 - nonzero / facts["params"],
        params=facts["params"],
        params_nonzero=nonzero,
        macs=facts["macs"],
        macs_nonzero=facts["macs_nonzero"],
        flops=2 * facts["macs"],
        bytes=facts["bytes"],
        bytes_stored=facts.get("bytes_stored"),
        **{name: facts.get(name) for name in STAGES},
        acc1=facts["acc1"],
        acc5=facts["acc5"],
        loss=facts["loss"],
        acc1_val=facts["acc1_val"],
        select_on=facts["select_on"],
        acc1_dense=dense["acc1"] if dense else None,
        acc1_delta=facts["acc1"] - dense["acc1"] if dense and dense["acc1"] is not None else None,
        compression=params / max(nonzero, 1),
        compression_bytes=(dense or facts)["bytes"] / max(stored, 1) if stored is not None else None,
        speedup_macs=(dense or facts)["macs"] / max(facts["macs"], 1),
        **{name: facts[name] for name in LATENCIES},
        slower_than_dense=slower(facts, dense),
        epochs=facts["epochs"],
        seconds=facts["seconds"],
        device=facts["device"],
        dense_sha256=dense["weights_sha256"] if dense else None,
        key=key,
    )

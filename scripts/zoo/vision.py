"""torchvision (classification, segmentation, video, detection) and a choice of timm's families."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import Case, Inputs, images

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
    "sequencer2d_s",
)
SIZES = {"inception_v3": 299, "maxvit_t": 224}
DETECTION = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn",
    "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
)  # fmt: skip


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Skips the initialisers: other values are filled in afterwards."""
    saved = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
    try:
        for name in saved:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


def of_timm(name: str) -> tuple[nn.Module, Inputs]:
    """A network of timm at its own size of images."""
    import timm

    with uninitialised():
        model = timm.create_model(name)
    return model, images(*model.default_cfg["input_size"])


def of_torchvision(source: str, name: str) -> tuple[nn.Module, Inputs]:
    """A network of torchvision at a small legal size."""
    import torchvision

    size = SIZES.get(name, 64)
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
    with uninitialised():
        model = torchvision.models.get_model(name, **options)
    if source == "video":
        large = name.startswith(("mvit", "swin3d", "s3d"))
        return model, images(3, 16 if large else 8, *((224, 224) if large else (64, 64)))
    return model, images(3, size, size)


class OfImages(nn.Module):
    """A detector, called with one tensor of images instead of a list."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Tensor) -> Any:
        return self.detector(list(batch))


def of_detection(name: str) -> tuple[nn.Module, Inputs]:
    """A detector on small images, as the package initialises it."""
    import torchvision

    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
    if not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        options |= {
            "rpn_post_nms_top_n_test": 20,
            "box_detections_per_img": 4,
        }  # a forward pass of keypoints takes 40 s else
    return OfImages(torchvision.models.get_model(name, **options)), lambda batch, g: torch.rand(
        batch, 3, 96, 96, generator=g
    )


def cases() -> list[Case]:
    """All of them."""
    found = []
    if importlib.util.find_spec("torchvision"):
        import torchvision

        for source, module in (
            ("classification", torchvision.models),
            ("segmentation", torchvision.models.segmentation),
            ("video", torchvision.models.video),
        ):
            names = [n for n in torchvision.models.list_models(module=module) if not n.startswith("quantized_")]
            found += [Case(f"torchvision {source}", n, partial(of_torchvision, source, n)) for n in names]
        found += [Case("torchvision detection", n, partial(of_detection, n), plain=True) for n in DETECTION]
    if importlib.util.find_spec("timm"):
        found += [Case("timm", name, partial(of_timm, name)) for name in TIMM]
    return found

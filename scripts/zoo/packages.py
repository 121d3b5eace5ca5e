"""Networks of pytorchcv, segmentation_models_pytorch, ultralytics, torchaudio and efficientnet_pytorch, untrained."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo import Case, Inputs, images

PYTORCHCV = (
    "alexnet", "zfnet", "vgg11", "bn_vgg11b", "bninception", "resnet10", "resnet14", "resnetbc14b", "resnetbc26b", "preresnet10",
    "preresnetbc14b", "resnext14_32x4d", "seresnet10", "sepreresnet10", "seresnext50_32x4d", "senet16",
    "resnestabc14", "ibn_resnet50", "ibn_resnext50_32x4d", "ibnb_resnet50", "ibn_densenet121", "airnet50_1x64d_r2",
    "airnext50_32x4d_r2", "bam_resnet18", "cbam_resnet18", "pyramidnet101_a360", "diracnet18v2", "sharesnet18", "densenet121",
    "condensenet74_c4_g4", "sparsenet121", "peleenet", "wrn50_2", "drnc26", "drnd22", "dpn68", "darknet_ref",
    "darknet_tiny", "darknet19", "darknet53", "irevnet301", "bagnet9", "dla34", "dla46c", "dla60", "hrnet_w18_small_v1",
    "vovnet27s", "selecsls42b", "hardnet39ds", "xdensenet121_2", "squeezenet_v1_0", "squeezenet_v1_1", "squeezeresnet_v1_1",
    "sqnxt23_w1", "shufflenet_g1_w1", "shufflenet_g3_wd4", "shufflenetv2_wd2", "shufflenetv2b_wd2", "menet108_8x1_g3",
    "mobilenet_wd4", "mobilenetb_wd4", "fdmobilenet_wd4", "mobilenetv2_wd4", "mobilenetv2b_wd4", "mobilenetv3_small_w1",
    "igcv3_wd4", "ghostnet", "mnasnet_b1", "mnasnet_small", "darts", "proxylessnas_cpu", "fbnet_cb", "xception",
    "inceptionv3", "inceptionv4", "inceptionresnetv1", "polynet", "nasnet_4a1056", "pnasnet5large", "spnasnet",
    "efficientnet_b0", "efficientnet_edge_small_b", "mixnet_s", "isqrtcovresnet18", "wrn20_10_1bit_cifar10",
    "nin_cifar10", "resnet20_cifar10", "preresnet20_cifar10", "seresnet20_cifar10",
    "pyramidnet110_a48_cifar10", "densenet40_k12_cifar10", "xdensenet40_2_k24_bc_cifar10", "wrn16_10_cifar10",
    "ror3_56_cifar10", "rir_cifar10", "shakeshakeresnet20_2x16d_cifar10", "diaresnet20_cifar10", "diapreresnet20_cifar10",
    "resnetd50b", "fastseresnet101b", "octresnet10_ad2", "dabnet_cityscapes", "fastscnn_cityscapes",
    "cgnet_cityscapes", "sinet_cityscapes", "bisenet_resnet18_celebamaskhq", "lednet_cityscapes", "icnet_resnetd50b_cityscapes",
    "fcn8sd_resnetd50b_voc", "pspnet_resnetd50b_voc", "deeplabv3_resnetd50b_voc",
)  # fmt: skip
SMP = (
    ("Unet", "resnet18"), ("Unet", "mobilenet_v2"), ("Unet", "efficientnet-b0"), ("Unet", "densenet121"), ("Unet", "mit_b0"),
    ("UnetPlusPlus", "resnet18"), ("UnetPlusPlus", "vgg11_bn"), ("Linknet", "resnet18"), ("FPN", "resnet18"),
    ("FPN", "timm-mobilenetv3_small_100"), ("PSPNet", "resnet18"), ("PAN", "resnet18"), ("DeepLabV3", "resnet18"),
    ("DeepLabV3Plus", "resnet18"), ("DeepLabV3Plus", "mobilenet_v2"), ("MAnet", "resnet18"), ("UPerNet", "resnet18"),
    ("Segformer", "mit_b0"),
)  # fmt: skip
YOLOS = (
    "v3/yolov3-tiny", "v5/yolov5n", "v6/yolov6n", "v8/yolov8n", "v8/yolov8n-seg", "v8/yolov8n-cls", "v8/yolov8n-pose",
    "v8/yolov8n-obb", "v8/yolov8n-ghost", "v9/yolov9t", "v10/yolov10n", "11/yolo11n", "11/yolo11n-seg", "11/yolo11n-cls",
    "12/yolo12n", "rt-detr/rtdetr-resnet50",
)  # fmt: skip


def of_pytorchcv(name: str) -> tuple[nn.Module, Inputs]:
    """A network of pytorchcv at a small legal size."""
    from pytorchcv.model_provider import get_model

    options: dict[str, Any] = {"pretrained": False}
    size = 32 if "cifar" in name else 224
    if name.endswith(("_voc", "_cityscapes", "_celebamaskhq")):
        size = 96 if "icnet" in name else 256 if "sinet" in name else 64
        options |= (
            {"in_size": (size, size), "pretrained_backbone": False} if "resnet" in name else {"in_size": (size, size)}
        )
    large = {
        "xception": 299,
        "inceptionv3": 299,
        "inceptionv4": 299,
        "inceptionresnetv1": 299,
        "polynet": 331,
        "pnasnet5large": 331,
    }
    size = large.get(name, size)
    return get_model(name, **options), images(3, size, size)


def of_smp(kind: str, encoder: str) -> tuple[nn.Module, Inputs]:
    """A decoder of segmentation_models_pytorch on an encoder."""
    import segmentation_models_pytorch

    model = getattr(segmentation_models_pytorch, kind)(encoder, encoder_weights=None, classes=3)
    size = 128 if kind == "PAN" else 64
    return model, images(3, size, size)


def of_yolo(name: str) -> tuple[nn.Module, Inputs]:
    """A network of ultralytics from its YAML."""
    from ultralytics.nn import tasks

    kind = {"seg": "SegmentationModel", "cls": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel"}.get(
        name.rpartition("-")[2], "RTDETRDetectionModel" if "rtdetr" in name else "DetectionModel"
    )
    folder = importlib.util.find_spec("ultralytics").submodule_search_locations[0]
    series, _, model = name.partition("/")
    path = f"{folder}/cfg/models/{series}/{model}.yaml"
    return getattr(tasks, kind)(path, verbose=False), images(3, 64, 64)


def of_torchaudio(name: str) -> tuple[nn.Module, Inputs]:
    """A network of torchaudio, small."""
    from torchaudio import models

    waves = images(1, 4000)
    if name == "wav2letter":
        return models.Wav2Letter(num_classes=10, input_type="mfcc", num_features=13), images(13, 80)
    if name == "deepspeech":
        return models.DeepSpeech(n_feature=13, n_hidden=24, n_class=10), images(1, 30, 13)
    if name == "wavernn":
        model = models.WaveRNN(upsample_scales=[2, 2], n_classes=8, hop_length=4, n_res_block=2, n_rnn=16, n_fc=16,
                               kernel_size=3, n_freq=8, n_hidden=16, n_output=16)  # fmt: skip
        return model, lambda batch, g: (
            torch.randn(batch, 1, 4 * (12 - 3 + 1), generator=g), torch.randn(batch, 1, 8, 12, generator=g))  # fmt: skip
    if name == "conv_tasnet":
        return models.ConvTasNet(num_sources=2, enc_num_feats=16, msk_num_feats=8, msk_num_hidden_feats=16,
                                 msk_num_layers=2, msk_num_stacks=2), waves  # fmt: skip
    if name == "conformer":
        model = models.Conformer(input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, depthwise_conv_kernel_size=3)
        return model, lambda batch, g: (torch.randn(batch, 20, 16, generator=g), torch.full((batch,), 20))
    if name == "emformer":
        model = models.Emformer(
            input_dim=16, num_heads=2, ffn_dim=24, num_layers=2, segment_length=4, right_context_length=1
        )
        return model, lambda batch, g: (torch.randn(batch, 9, 16, generator=g), torch.full((batch,), 9))
    if name == "hdemucs":
        return models.HDemucs(sources=["a", "b"], channels=8, nfft=256, depth=3), images(2, 4000)
    model = models.wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)], extractor_conv_bias=False,
        encoder_embed_dim=24, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=8, encoder_pos_conv_groups=2,
        encoder_num_layers=2, encoder_num_heads=4, encoder_attention_dropout=0.0, encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.0,
        aux_num_out=8,
    )  # fmt: skip
    return model, images(1000)


def of_efficientnet(name: str) -> tuple[nn.Module, Inputs]:
    """A network of efficientnet_pytorch."""
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name(name, image_size=64), images(3, 64, 64)


def cases() -> list[Case]:
    """Those of the packages that are there."""
    found = []
    if importlib.util.find_spec("pytorchcv"):
        found += [Case("pytorchcv", name, partial(of_pytorchcv, name)) for name in PYTORCHCV]
    if importlib.util.find_spec("segmentation_models_pytorch"):
        found += [Case("segmentation_models_pytorch", f"{k} {e}", partial(of_smp, k, e)) for k, e in SMP]
    if importlib.util.find_spec("ultralytics"):
        found += [Case("ultralytics", name, partial(of_yolo, name)) for name in YOLOS]
    if importlib.util.find_spec("torchaudio"):
        names = ("wav2letter", "deepspeech", "wavernn", "conv_tasnet", "conformer", "emformer", "hdemucs", "wav2vec2")
        found += [Case("torchaudio", name, partial(of_torchaudio, name)) for name in names]
    if importlib.util.find_spec("efficientnet_pytorch"):
        found += [Case("efficientnet_pytorch", f"efficientnet-b{n}", partial(of_efficientnet, f"efficientnet-b{n}"))
                  for n in range(4)]  # fmt: skip
    return found

"""Networks of transformers, small ones by their configurations; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo import Case, Inputs

VOCABULARY = 99
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 16},
    "BigBird": {"attention_type": "original_full"},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "Electra": {"embedding_size": 16},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconMamba": {"state_size": 8},
    "Funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]},
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTJ": {"rotary_dim": 4},
    "CodeGen": {"rotary_dim": 4, "n_ctx": 64},
    "Mamba": {"state_size": 8},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "MobileBert": {"intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "shared_expert_intermediate_size": 24},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi3": {"pad_token_id": 0},
    "SqueezeBert": {"embedding_size": 32},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}  # fmt: skip
WITHOUT = {
    "Falcon": ("head_dim",),
    "Funnel": ("num_hidden_layers",),
    "ProphetNet": ("num_layers", "num_heads"),
    "XLNet": ("max_position_embeddings",),
}
ENCODERS = (
    "Bert", "Roberta", "Electra", "DistilBert", "Albert", "Deberta", "DebertaV2", "MPNet", "Camembert", "XLMRoberta",
    "Ernie", "RoFormer", "MobileBert", "SqueezeBert", "Funnel", "ConvBert", "BigBird", "Longformer", "Data2VecText",
    "MegatronBert", "LayoutLM", "IBert", "FNet", "Nystromformer", "Yoso", "ModernBert", "Splinter", "Canine", "RemBert",
    "XLNet", "XLM", "Flaubert",
)  # fmt: skip
DECODERS = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "GPTNeoX", "GPT2", "GPTNeo", "GPTJ", "OPT",
    "Bloom", "Falcon", "Mixtral", "Qwen2Moe", "Olmo", "Olmo2", "Olmoe", "StableLm", "Starcoder2", "Cohere", "Granite",
    "Persimmon", "Mamba", "Mamba2", "FalconMamba", "CodeGen", "BioGpt", "XGLM", "GPTBigCode", "Glm", "Nemotron", "Mpt",
    "OpenAIGPT", "CTRL",
)  # fmt: skip
SEQUENCES = ("T5", "Bart", "Pegasus", "MBart", "Marian", "Blenderbot", "M2M100", "LED", "ProphetNet", "MT5", "LongT5")
PICTURES: dict[str, dict[str, Any]] = {
    "ViT": {}, "DeiT": {}, "Beit": {}, "Data2VecVision": {}, "Dinov2": {}, "ViTMSN": {}, "ViTMAE": {"mask_ratio": 0.5},
    "Yolos": {"num_detection_tokens": 4}, "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "Swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "ConvNextV2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "groups_width": 4},
    "MobileViT": {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 48], "num_attention_heads": 4},
    "MobileNetV1": {}, "MobileNetV2": {}, "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "Segformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
                  "decoder_hidden_size": 16},
    "PoolFormer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "PvtV2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
    "Pvt": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "Cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 1]}, "Bit": {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_groups": 1},
    "Levit": {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "image_size": 224},
    "GLPN": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
    "VideoMAE": {"num_frames": 4}, "Timesformer": {"num_frames": 4}, "SwiftFormer": {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
    "TextNet": {}, "Hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "image_size": [64, 64]},
    "EfficientFormer": {}, "Van": {}, "Nat": {}, "Dinat": {},
}  # fmt: skip
SOUNDS: dict[str, dict[str, Any]] = {
    "Wav2Vec2": {}, "Hubert": {}, "WavLM": {}, "SEW": {}, "UniSpeech": {}, "UniSpeechSat": {}, "Data2VecAudio": {}, "SEWD": {},
}  # fmt: skip
WAVES = {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}  # fmt: skip


def ids(length: int = 12, *, mask: bool = False, decoder: bool = False) -> Inputs:
    """Token ids, with an attention mask that hides some, or ids for a decoder."""

    def make(batch: int, generator: torch.Generator) -> Any:
        found: dict[str, Any] = {"input_ids": torch.randint(4, VOCABULARY, (batch, length), generator=generator)}
        if mask:
            found["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
            found["attention_mask"][:, -3:] = 0
        if decoder:
            found["decoder_input_ids"] = torch.randint(4, VOCABULARY, (batch, 7), generator=generator)
        return found

    return make


def named(suffixes: tuple[str, ...], name: str, options: dict[str, Any]) -> nn.Module:
    """A model by the first of its heads that transformers has."""
    import transformers

    options = {key: value for key, value in options.items() if key not in WITHOUT.get(name, ())}
    config = getattr(transformers, f"{name}Config")(**options)
    config.use_cache = False
    for suffix in suffixes:
        if (kind := getattr(transformers, name + suffix, None)) is not None:
            return kind(config)
    raise AttributeError(f"transformers has no {name} of {suffixes}")


def text(suffixes: tuple[str, ...], name: str, mask: bool, more: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """An encoder or a decoder on token ids."""
    return named(suffixes, name, TEXT | EXTRA.get(name, {}) | more), ids(mask=mask)


def sequences(name: str) -> tuple[nn.Module, Inputs]:
    """An encoder with a decoder."""
    sizes = {
        "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "attention_window": 4,
    }  # fmt: skip
    if "T5" in name:
        sizes.pop("encoder_layers"), sizes.pop("decoder_layers")
    return named(("ForConditionalGeneration", "MTModel", "Model"), name, sizes), ids(decoder=True)


def pictures(name: str) -> tuple[nn.Module, Inputs]:
    """A network on images or short videos."""
    options = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 5} | PICTURES[name]
    if "hidden_sizes" not in options and "embed_dim" not in options:
        options = TEXT | options
        for key in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", "num_key_value_heads", "head_dim"):
            options.pop(key)
    model = named(("ForImageClassification", "ForVideoClassification", "ForObjectDetection", "ForDepthEstimation",
                   "ForPreTraining", "Model"), name, options)  # fmt: skip
    size = options["image_size"] if isinstance(options["image_size"], int) else options["image_size"][0]
    size = 64 if name in ("Levit",) and size < 64 else size
    if name in ("Segformer", "PoolFormer", "PvtV2", "Pvt", "GLPN", "Cvt", "MobileViT", "RegNet", "ResNet", "Bit", "ConvNext",
                "ConvNextV2", "EfficientNet", "MobileNetV1", "MobileNetV2", "SwiftFormer", "TextNet"):  # fmt: skip
        size = 64 if name != "SwiftFormer" else 224
    frames = (4,) if "num_frames" in options else ()
    noise = {"noise": (size // 8) ** 2} if name == "ViTMAE" else {}

    def make(batch: int, generator: torch.Generator) -> Any:
        found = {"pixel_values": torch.randn(batch, *frames, 3, size, size, generator=generator)}
        if noise:
            found["noise"] = torch.rand(batch, noise["noise"], generator=generator)
        return found

    return model, make


def sounds(name: str) -> tuple[nn.Module, Inputs]:
    """A network on waves."""
    options = TEXT | WAVES | SOUNDS[name] | {"vocab_size": 12}
    model = named(("ForCTC", "Model"), name, options)
    return model, lambda batch, generator: {"input_values": torch.randn(batch, 2000, generator=generator)}


def whisper() -> tuple[nn.Module, Inputs]:
    """Speech to text on spectrograms."""
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, use_cache=False,
    )  # fmt: skip

    def make(batch: int, generator: torch.Generator) -> Any:
        return {
            "input_features": torch.randn(batch, 8, 40, generator=generator),
            "decoder_input_ids": torch.randint(4, VOCABULARY, (batch, 6), generator=generator),
        }

    return transformers.WhisperForConditionalGeneration(config), make


def clip(name: str) -> tuple[nn.Module, Inputs]:
    """A tower for text and one for images."""
    import transformers

    text_config = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
    picture = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 32, "patch_size": 8}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(text_config=text_config, vision_config=picture, projection_dim=16)

    def make(batch: int, generator: torch.Generator) -> Any:
        return {
            "input_ids": torch.randint(4, VOCABULARY, (batch, 12), generator=generator),
            "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        }

    return getattr(transformers, f"{name}Model")(config), make


def cases() -> list[Case]:
    """All of them; decoders with and without an attention mask."""
    if not importlib.util.find_spec("transformers"):
        return []
    classify = ("ForSequenceClassification", "Model")
    causal = ("ForCausalLM", "LMHeadModel", "Model")
    found = [Case("transformers", name, partial(text, classify, name, True, {})) for name in ENCODERS]
    found += [Case("transformers", name, partial(text, causal, name, False, {})) for name in DECODERS]
    found += [Case("transformers", f"{name} masked", partial(text, causal, name, True, {})) for name in DECODERS[:21]]
    found += [
        Case(
            "transformers", f"{name} experts {how}", partial(text, causal, name, False, {"experts_implementation": how})
        )
        for name in ("Mixtral", "Qwen2Moe", "Olmoe")
        for how in ("eager", "batched_mm")
    ]
    found += [Case("transformers", name, partial(sequences, name)) for name in SEQUENCES]
    found += [Case("transformers", name, partial(pictures, name)) for name in PICTURES]
    found += [Case("transformers", name, partial(sounds, name)) for name in SOUNDS]
    found += [Case("transformers", "Whisper", whisper)]
    found += [Case("transformers", name, partial(clip, name)) for name in ("CLIP", "Siglip")]
    return found

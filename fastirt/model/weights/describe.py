"""The likely model of a set of tensors, by names and shapes; only for error messages."""

from __future__ import annotations

import re
from typing import Iterable, Optional

from torch import Tensor, nn

BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks|layers?|encoder_layer|h)[._](\d+)\.")
RESNETS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
VIT_SIZES = {192: "ViT-Ti", 384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g", 1536: "ViT-g"}
WIDTHS = ("cls_token", "class_token", "class_embedding", "pos_embed", "position_embedding", "positional_embedding")
FAMILIES = (  # (family, a pattern of its tensor names); the first match counts
    ("a diffusion model", r"diffusion_model\.|up_blocks\.\d"),
    ("a SAM image encoder", r"image_encoder\.neck|(^|\.)neck\.\d.*weight|mask_decoder\."),
    ("a CLIP model with transformers' names", r"vision_model\.encoder\.layers\."),
    ("a CLIP {vit}", r"visual\.(transformer\.resblocks|conv1|class_embedding)|transformer\.resblocks\."),
    ("a {vit} with transformers' names", r"encoder\.layer\.\d+\.(attention|norm1|layernorm)"),
    ("a {vit} with torchvision's names", r"encoder_layer_\d+\."),
    ("a language model", r"(^|\.)(wte|embed_tokens|word_embeddings)\."),
    ("a ConvNeXt", r"stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv|gamma)"),
    ("a Swin transformer", r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table"),
    ("a ResNet", r"layer4\.\d+\.conv1\.weight"),
    ("an EfficientNet or MobileNet", r"conv_pw|_depthwise_conv|features\.\d+\.conv|block\.\d+\.\d\.weight"),
    ("a VGG or AlexNet", r"features\.\d+\.weight"),
    ("a DINOv3 {vit}", r"storage_tokens"),
    ("a DINOv2 {vit} with registers", r"register_tokens"),
    ("an MAE {vit}", r"decoder_embed\.|decoder_blocks\."),
    ("a BEiT {vit}", r"relative_position_bias_table|rel_pos_bias"),
    ("an EVA {vit}", r"rope\.freqs|mlp\.w12|mlp\.fc1_g|attn\.q_(proj|bias)"),
    ("a distilled DeiT {vit}", r"(^|\.)dist_token"),
    ("a DINOv2 {vit}", r"blocks\.(\d+\.)+ls1\.gamma"),
    ("a CLIP {vit}", r"(^|\.)norm_pre\."),
    ("a {vit}", r"blocks\.\d+\.(attn|norm1)|(^|\.)cls_token"),
)


def describe_tensors(tensors: dict[str, Tensor]) -> str:
    """For example `a DINOv2 ViT-L (embed_dim 1024, depth 24)`; names of an unknown model."""
    family = next((name for name, pattern in FAMILIES if any(re.search(pattern, key) for key in tensors)), None)
    if family is None:
        return f"an unknown model (its names: {', '.join(list(tensors)[:3])})"
    if family == "a ResNet":
        return _resnet(tensors)
    if "{vit}" not in family:
        return family
    width, depth = _width(tensors), _depth(tensors)
    size = ", ".join([f"embed_dim {width}"] * (width is not None) + [f"depth {depth}"] * (depth > 0))
    return family.format(vit=VIT_SIZES.get(width or 0, "ViT")) + (f" ({size})" if size else "")


def describe_model(vit: nn.Module) -> str:
    """For example `vit_tiny_patch16_224 (embed_dim 192, depth 12)`."""
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture", type(vit).__name__)
    return f"{name} (embed_dim {vit.num_features}, depth {len(vit.blocks)})"


def _width(tensors: dict[str, Tensor]) -> Optional[int]:
    for word in WIDTHS:
        for name, value in tensors.items():
            if word in name and "text" not in name and "decoder" not in name and value.ndim:
                return value.shape[-1]
    return next((v.shape[0] for n, v in tensors.items() if "patch_embed" in n and n.endswith("proj.weight")), None)


def _depth(tensors: dict[str, Tensor]) -> int:
    """Number of blocks of the encoder, of the visual tower in CLIP."""
    names: Iterable[str] = [name for name in tensors if "decoder" not in name]
    names = [name for name in names if "visual" in name] or names
    return max((int(match[1]) for match in map(BLOCK.search, names) if match), default=-1) + 1


def _resnet(tensors: dict[str, Tensor]) -> str:
    matches = [re.search(r"layer([1-4])\.(\d+)\.conv1\.weight$", name) for name in tensors]
    counts = [0, 0, 0, 0]
    for match in filter(None, matches):
        counts[int(match[1]) - 1] = max(counts[int(match[1]) - 1], int(match[2]) + 1)
    size = RESNETS.get(tuple(counts))  # type: ignore[call-overload]
    if size == 34 and any(name.endswith("layer1.0.conv3.weight") for name in tensors):
        size = 50
    return f"a ResNet-{size}" if size else "a ResNet"

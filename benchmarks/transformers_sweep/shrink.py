"""Small configs of any model of transformers, by the names of their fields."""

from __future__ import annotations

import re
from typing import Any

HIDDEN, HEADS, INNER, LAYERS, VOCABULARY, IMAGE, PATCH, WINDOW = 32, 4, 64, 2, 128, 32, 8, 4
FIRST_SPECIAL = 100  # special tokens of a large vocabulary move here
_KEPT = ("num_feat_extract_layers", "num_conv_layers")
_KEY_HEADS = re.compile(r"(key_value_heads|kv_heads)$")
_IDS = re.compile(r"(_token_id|_token_index|_id)$")
_WINDOWS = r"(window_size|attention_window|local_attention|sliding_window|block_size)$"
_INTEGERS: tuple[tuple[str, int], ...] = (
    (r"image_embedding_size$", IMAGE // PATCH),
    (r"num_pos_feats$", HIDDEN // 2),
    (r"(num_global_key_value_heads|key_value_heads|kv_heads|kv_n_heads|num_kv|multi_query_group_num)", 2),
    (r"(rotary_dim|qk_rope_head_dim|qk_nope_head_dim|index_head_dim)$", 4),
    (r"(head_dim|d_kv|attention_head_size|kv_channels|d_head|head_size|kv_lora_rank|q_lora_rank)$", HIDDEN // HEADS),
    (r"(attention_heads|_heads|^n_heads?|^num_head|_head$|nhead$|n_head$)", HEADS),
    (r"(intermediate|ffn|d_ff$|n_inner|feed_?forward|inner_dim|d_inner|dim_ff|mlp_dim|mlp_hidden)", INNER),
    (r"(num_.*layers?|n_layers?$|_layers?$|num_blocks|num_layers_.*|^depth$|num_hidden_groups|_depth$)", LAYERS),
    (r"vocab_size", VOCABULARY),
    (r"(experts_per_tok|top_k_experts|moe_topk|moe_top_k|num_selected_experts|n_group|topk_group|moe_k)$", 1),
    (r"(num_.*experts|n_routed_experts|moe_num_experts|num_experts)$", 4),
    (r"(num_.*queries|query_length|num_query_tokens|num_latents|num_image_tokens|latents)$", 8),
    (r"(projector_hidden|cross_attention_dim|projection_dim|shared_dim|mapping_dim)", HIDDEN),
    (r"(embed_dim|embedding_dim|embedding_size|hidden_size|hidden_dim|d_model|n_embd|^dim$|d_embed|emb_size|hidden_channels"
     r"|out_hidden|encoder_dim|decoder_dim|output_dim|emb_dim|bottleneck|feature_size|model_dim|mask_feature|fpn"
     r"|output_channels)", HIDDEN),
    (r"(image_size|img_size|input_size|resolution|max_img)$", IMAGE),
    (r"(patch_size|tile_size)$", PATCH),
    (_WINDOWS, WINDOW),
    (r"(max_position_embeddings|n_positions|max_length|seq_length|max_sequence_length|max_seq_len)$", 128),
    (r"(num_attention_layers|num_frames)$", 2),
)  # fmt: skip


_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
           "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
_RESNET_LAST = _RESNET | {"out_features": ["stage4"]}
_SWIN = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_GIVEN: dict[str, dict[str, Any]] = {  # what no rule by name finds
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "reformer": {"axial_pos_embds": False, "max_position_embeddings": 128},
    "detr": {"backbone_config": _RESNET_LAST, "use_timm_backbone": False, "backbone": None},
    "conditional_detr": {"backbone_config": _RESNET_LAST, "use_timm_backbone": False, "backbone": None},
    "dab-detr": {"backbone_config": _RESNET_LAST, "use_timm_backbone": False, "backbone": None},
    "table-transformer": {"backbone_config": _RESNET_LAST, "use_timm_backbone": False, "backbone": None},
    "deformable_detr": {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None},
    "lilt": {"hidden_size": 48},
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "bros": {"dim_bbox": 8, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_projection": 8},
}


def small(config_class: Any) -> Any:
    """An instance of a config class, with everything in it that costs time or memory made small."""
    default, given = config_class(), _GIVEN.get(config_class.model_type, {})
    return config_class(**_shrunk(default.to_dict(), default, {}) | given)


def _shrunk(fields: dict[str, Any], config: Any, specials: dict[str, int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    large = max((v for k, v in fields.items() if "vocab_size" in k and isinstance(v, int)), default=0)
    for name, value in fields.items():
        if isinstance(value, dict) and (name.endswith("config") or name in ("encoder", "decoder")):
            sub = getattr(config, name, None)
            kept = {k: value[k] for k in ("model_type",) if k in value}
            out[name] = kept | _shrunk(value, sub, specials)
        elif isinstance(value, dict) and "mrope_section" in value:
            out[name] = value | {"mrope_section": [2, 1, 1]}  # half of the head's dimensions
        elif name == "head_dim" and value is None:
            out[name] = HIDDEN // HEADS
        elif isinstance(value, bool) or value is None or name in _KEPT:
            continue
        elif _KEY_HEADS.search(name) and value in (fields.get("num_attention_heads"), fields.get("n_head")):
            out[name] = HEADS
        elif name == "head_dim" and "qk_rope_head_dim" in fields:  # DeepSeek's is that one
            out[name] = 4
        elif isinstance(value, int):
            small_value = _integer(name, value, large, specials)
            if small_value is not None:
                out[name] = small_value
        elif isinstance(value, (list, tuple)) and value:
            small_list = _listed(name, list(value))
            if small_list is not None:
                out[name] = small_list
    return out


def _integer(name: str, value: int, large: int, specials: dict[str, int]) -> int | None:
    if _IDS.search(name):
        if value < VOCABULARY - 28:
            return None
        return specials.setdefault(name, FIRST_SPECIAL + len(specials) % (VOCABULARY - FIRST_SPECIAL))
    for pattern, small_value in _INTEGERS:
        if re.search(pattern, name):
            if pattern == _WINDOWS and value >= 100:  # in pixels
                return IMAGE
            return min(value, small_value) if value > 0 else None
    return None


def _listed(name: str, values: list[Any]) -> list[Any] | None:
    if all(isinstance(v, str) for v in values) and ("layer" in name or "block" in name) and len(values) > LAYERS:
        kinds = list(dict.fromkeys(values))
        return (kinds + kinds)[:LAYERS] if len(kinds) < LAYERS else [kinds[0], kinds[-1]]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return None
    if re.search(r"(depths|blocks_per_stage|num_.*layers|layers|num_blocks|num_encoder_blocks)$", name):
        return [min(v, 1) for v in values]
    if "head" in name:
        return [v if HEADS % v == 0 else HEADS for v in values]
    if re.search(
        r"(hidden_sizes|embed_dims?|encoder_hidden|decoder_hidden|channels|channel_list|dims|dim_per_stage)$", name
    ):
        return [min(v, HIDDEN) for v in values]
    if re.search(r"(image_size|img_size|input_size)$", name):
        return [IMAGE] * len(values)
    if name == "window_size_per_stage":
        return [2] * len(values)
    if name == "patch_size":
        return [min(v, PATCH) for v in values]
    return None

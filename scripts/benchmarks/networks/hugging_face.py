"""Encoders and decoders of Hugging Face's transformers with small random configurations; each gives its last hidden state or its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from networks.stranger import Stranger, normal, pictures, tokens

TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


class Output(nn.Module):
    """A network of which one output is asked, by name."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.network(x), self.output)  # type: ignore[no-any-return]


def _network(kind: str, output: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        name = kind.replace("LMHead", "").removesuffix("ForCausalLM").removesuffix("ForImageClassification")
        stem = name.removesuffix("Model")
        config = getattr(transformers, f"{stem}Config")(**options)
        config._attn_implementation = "eager"
        if hasattr(config, "use_cache"):
            config.use_cache = False
        return Output(getattr(transformers, kind)(config), output)

    return build


def strangers() -> list[Stranger]:
    """All of them."""
    hidden, text = "last_hidden_state", tokens(16, 200)
    picture = {"image_size": 64, "patch_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sound = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    feature = {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3}
    swin = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    mobile = {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]}
    pyramid = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
    pyramid |= {"sr_ratios": [4, 2], "strides": [4, 2], "patch_sizes": [7, 3], "mlp_ratios": [2, 2]}
    residual = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    rows: list[tuple[str, str, dict[str, Any], Any]] = [
        ("BertModel", hidden, TEXT, text),
        ("RobertaModel", hidden, TEXT | {"pad_token_id": 0}, text),
        ("AlbertModel", hidden, TEXT | {"embedding_size": 32}, text),
        ("DistilBertModel", hidden, {"vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, text),
        ("ElectraModel", hidden, TEXT | {"embedding_size": 32}, text),
        ("GPT2LMHeadModel", "logits", {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, text),
        ("LlamaForCausalLM", "logits", TEXT | {"num_key_value_heads": 2}, text),
        ("ViTModel", hidden, picture | {"intermediate_size": 128}, pictures(64)),
        ("Wav2Vec2Model", hidden, sound | feature | positions, normal(1600)),
        ("SwinModel", hidden, swin, pictures(64)),
        ("ResNetForImageClassification", "logits", residual, pictures(64)),
        ("MobileViTModel", hidden, mobile, pictures(64)),
        ("SegformerModel", hidden, pyramid, pictures(64)),
    ]
    return [
        Stranger(name=kind, manner="transformers", build=_network(kind, output, options), draw=draw)
        for kind, output, options, draw in rows
    ]

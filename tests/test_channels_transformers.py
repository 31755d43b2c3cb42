"""Channels removed from other people's transformers and their kin: encoders for text, pictures and sound, and decoders."""

import pytest
import torch
from torch import nn

import torchopt

transformers = pytest.importorskip("transformers")

IDS, IMAGE, SOUND = torch.arange(24).view(2, 12), torch.randn(2, 3, 64, 64), torch.randn(2, 1600)
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = {**TEXT, "vocab_size": 100, "max_position_embeddings": 66}
DISTILBERT = {"vocab_size": 100, "max_position_embeddings": 66, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
SWIN = {"image_size": 64, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}
SPEECH = {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16}
NETS = {  # model, configuration, its fields, input, the share of parameters left at most
    "bert": ("BertForSequenceClassification", "BertConfig", WORDS, IDS, 0.35),
    "roberta": ("RobertaModel", "RobertaConfig", WORDS, IDS, 0.65),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTILBERT, IDS, 0.65),
    "albert": ("AlbertModel", "AlbertConfig", {**WORDS, "embedding_size": 32}, IDS, 0.65),
    "gpt2": ("GPT2Model", "GPT2Config", GPT2, IDS, 0.75),
    "t5": ("T5EncoderModel", "T5Config", T5, IDS, 0.65),
    "vit": ("ViTModel", "ViTConfig", {**TEXT, "image_size": 64, "patch_size": 16}, IMAGE, 0.8),
    "swin": ("SwinModel", "SwinConfig", SWIN, IMAGE, 0.6),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONVNEXT, IMAGE, 0.6),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", {**TEXT, **SPEECH, "num_conv_pos_embedding_groups": 4}, SOUND, 0.7),
}


def build(name: str) -> nn.Module:
    model, config, fields, _, _ = NETS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_shrink_and_reload(name, tmp_path):
    model, x, most = build(name), NETS[name][3], NETS[name][4]
    shrunk = torchopt.shrink(model, (x,), ratio=0.5)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(shrunk) <= most * count(model)
    torchopt.save(shrunk, tmp_path / "small.safetensors")
    again = torchopt.load(tmp_path / "small.safetensors", build(name)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x)[0], shrunk(x)[0], rtol=0, atol=0)

"""Tiny encoders of several families, as directories that sentence-transformers might have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from piecework.models.adapter import build_request
from piecework.spec.model_spec import ModelSpec

_ROBERTA: dict[str, Any] = {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"architectures": ["BertModel"]},
    "roberta": {"architectures": ["RobertaModel"], **_ROBERTA},
    "xlm-roberta": {"architectures": ["XLMRobertaModel"], **_ROBERTA},
    "distilbert": {"architectures": ["DistilBertModel"], "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "electra": {"architectures": ["ElectraModel"], "embedding_size": 24},
    "albert": {"architectures": ["AlbertModel"], "embedding_size": 24},
    "modernbert": {
        "architectures": ["ModernBertModel"],
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "mpnet": {"architectures": ["MPNetModel"], "pad_token_id": 1, "max_position_embeddings": 66},
    "deberta-v2": {
        "architectures": ["DebertaV2Model"],
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta": {
        "architectures": ["DebertaModel"],
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "t5": {"architectures": ["T5EncoderModel"], "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
    "nomic_bert": {"architectures": ["NomicBertModel"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None},
}

POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "3_Normalize"}


def write_encoder(
    directory: Path,
    family: str = "bert",
    *,
    pooling: str | Sequence[str] = "mean",
    rest: Sequence[Any] = (),
    **changes: Any,
) -> Path:
    """Write a sentence-transformers directory without weights: the transformer, the pooling and the rest."""
    write_plain(directory, family, **changes)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}, POOLING, *rest]
    named = [{"idx": number, "name": str(number), **module} for number, module in enumerate(modules)]
    _write(directory / "modules.json", named)
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode": pooling})
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    if DENSE in rest:
        sizes = {"in_features": 32, "out_features": 20, "bias": True}
        activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
        _write(directory / "2_Dense" / "config.json", {**sizes, **activation})
    return directory


def write_plain(directory: Path, family: str = "bert", **changes: Any) -> Path:
    """Write the directory of a transformers encoder alone, without weights."""
    config = {
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **ENCODERS.get(family, {}),
        **changes,
    }
    _write(directory / "config.json", config)
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40, **special}
    _write(directory / "tokenizer_config.json", settings)
    _tokenizer(pads_with_one=config["pad_token_id"] == 1).save(str(directory / "tokenizer.json"))
    return directory


def save_weights(directory: Path, *, seed: int = 0) -> nn.Module:
    """Give a directory random weights; return transformers' own model with them."""
    model = reference_encoder(directory, seed=seed)
    save_file({n: t.contiguous() for n, t in model.named_parameters()}, directory / "model.safetensors")
    if (directory / "2_Dense").exists():
        torch.manual_seed(seed)
        dense = nn.Linear(32, 20)
        save_file(
            {f"linear.{n}": t for n, t in dense.state_dict().items()}, directory / "2_Dense" / "model.safetensors"
        )
    return model


def reference_encoder(directory: Path, *, seed: int = 0) -> Any:
    """Return transformers' own model of a directory, with random weights."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(directory)
    scores = config.architectures[0].endswith("ForSequenceClassification")
    auto = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModel
    if config.architectures[0].endswith("EncoderModel"):
        auto = transformers.AutoModelForTextEncoding
    return auto.from_config(config).eval().requires_grad_(False)


def packed_encoder(directory: Path, reference: nn.Module) -> Any:
    """Return the adapter's module with the reference's weights, and how it is called, on lists of tokens."""
    request = build_request(ModelSpec.of(directory, max_tokens=128))
    module: Any = request.module
    module.model.load_state_dict(reference.state_dict(), strict=False, assign=True)
    assert not any(p.is_meta for p in module.model.parameters())

    def run(texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> Tensor:
        lengths = [len(text) for text in texts]
        kinds = types or [[0] * length for length in lengths]
        inputs = {
            "input_ids": torch.tensor([token for text in texts for token in text]),
            "positions": torch.cat([torch.arange(length) for length in lengths]),
            "token_type_ids": torch.tensor([kind for text in kinds for kind in text]),
            "query_start": torch.tensor([0, *lengths]).cumsum(0),
            "places": torch.arange(max(2, *lengths)),
        }
        with torch.inference_mode():
            made: Tensor = request.call(module, {given.name: inputs[given.name] for given in request.inputs})
        return made

    return run


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _tokenizer(*, pads_with_one: bool) -> Tokenizer:
    """Return a tokenizer of single letters that puts 1 before a text and 2 behind it, as BERT's do, or 0 and 2."""
    first, padding = (0, 1) if pads_with_one else (1, 0)
    vocab = {"[PAD]": padding, "[CLS]": first, "[SEP]": 2, "[UNK]": 3, **{chr(97 + i): 4 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", first), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=64)  # as some directories have it; texts are packed here
    return tokenizer

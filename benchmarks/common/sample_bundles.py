"""Small bundles that differ in what their plans hold, each with its weights and a forward that gives results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.bundle import Bundle, open_bundle, write_bundle
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.run.loading import read_plan
from piecework.bundle.store.directory import DirectoryStore
from piecework.capture.request import Dim
from piecework.compiler.driver import compile_request
from piecework.compiler.model import started_backend
from piecework.compiler.setup import CompileSetup
from piecework.foundation.environment import read_environment
from piecework.foundation.target import read_target
from piecework.models.adapter import build_causal_lm
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.model_spec import ModelSpec

ROWS: Final = (1, 5)


@dataclass(frozen=True)
class Sample:
    """A bundle, its weights by name, and what calls it: the flat results of two small batches."""

    bundle: Bundle
    weights: Mapping[str, Tensor]
    run: Callable[[LoadedModel], list[Tensor]]
    run_reference: Callable[[Any], list[Tensor]]

    def load(self, path: Path | None = None) -> LoadedModel:
        """Load a bundle with these weights: this one, or one that was made of it."""
        return load(self.bundle if path is None else path, weights=self.weights)


class _Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.register_buffer("table", torch.arange(size) / size, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x)))) * self.table


class _Blocks(nn.Module):
    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(size) for _ in range(count))
        self.scale = torch.full((size,), 0.5)  # no parameter, no buffer: a literal

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for block in self.blocks:
            x = torch.ops.piecework.rows(block(x), 0, x.shape[0])
        return x * self.scale, {"sums": x.sum(-1)}


def stack(root: Path, backend: BackendName, *, size: int = 8) -> Sample:
    """Return a stack of three blocks with an opaque op after each, a literal, and a nested result."""
    torch.manual_seed(0)
    module = _Blocks(3, size).eval()
    out = root / f"stack-{backend.value}"
    example = torch.randn(3, size)
    bundle = _opened(out) or piecework.compile(
        module, (example,), dynamic={"rows": Dim(1, 64)}, options=CompileOptions(backend=backend), out=out
    )
    batches = [torch.randn(rows, size) for rows in ROWS]

    def run(model: LoadedModel) -> list[Tensor]:
        found: list[Tensor] = []
        for x in batches:
            found += _flat(model(x))
        return found

    def run_reference(reference: Any) -> list[Tensor]:
        return [tensor for x in batches for tensor in reference.run({reference.plan.inputs[0].name: x})]

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return Sample(bundle, {name: tensor.detach() for name, tensor in tensors.items()}, run, run_reference)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _flat(part)]


def language_model(root: Path, model_dir: Path, backend: BackendName) -> Sample:
    """Return the bundle of a tiny language model: states, recipes of several tensors, opaque ops with constants."""
    spec = ModelSpec.of(model_dir, max_tokens=64)
    out = root / f"{spec.config.raw['model_type']}-{backend.value}"
    bundle = _opened(out) or _compiled(spec, backend, out)
    generator = torch.Generator().manual_seed(0)
    recipes = [recipe for recipe in read_plan(bundle).recipes if not recipe.literal]
    takes = {take.name: take.shape for recipe in recipes for take in recipe.takes}
    weights = {name: torch.randn(takes[name], generator=generator) * 0.1 for name in sorted(takes)}
    return Sample(bundle, weights, _run_language_model, _run_language_model)


def _opened(path: Path) -> Bundle | None:
    """Return a bundle that was compiled by a process before."""
    return open_bundle(path) if path.is_dir() else None


def _compiled(spec: ModelSpec, backend: BackendName, out: Path) -> Bundle:
    options = CompileOptions(backend=backend)
    request = build_causal_lm(spec)
    environment, target = read_environment(), read_target()
    store = DirectoryStore(environment.store_root)
    with (
        store.scratch() as scratch,
        started_backend(options, scratch=scratch, environment=environment, target=target, device="cpu") as compiler,
    ):
        content = compile_request(request, CompileSetup(options, compiler, store, target)).content
        return write_bundle(out, content)


def _run_language_model(model: Any) -> list[Tensor]:
    model.make_states({"blocks": 4})
    tokens = 5
    prompt: dict[str, Any] = {
        "input_ids": torch.arange(tokens) + 3,
        "positions": torch.arange(tokens),
        "slot_mapping": torch.arange(tokens) + 16,
        "block_tables": torch.tensor([[1, 2]]),
        "seq_lens": torch.tensor([tokens]),
        "query_start": torch.tensor([0, tokens]),
        "logits_indices": torch.tensor([tokens - 1]),
        "num_decode_tokens": 0,
        "num_prefill_tokens": tokens,
    }
    step = {
        **prompt,
        "input_ids": torch.tensor([7]),
        "positions": torch.tensor([tokens]),
        "slot_mapping": torch.tensor([16 + tokens]),
        "seq_lens": torch.tensor([tokens + 1]),
        "query_start": torch.tensor([0, 1]),
        "logits_indices": torch.tensor([0]),
        "num_decode_tokens": 1,
        "num_prefill_tokens": 0,
    }
    return [*model.run(prompt), *model.run(step)]


LLAMA: Final = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
}


LATENT: Final = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def llama(root: Path, backend: BackendName) -> Sample:
    """Return a tiny Llama of three layers."""
    return _configured(root, LLAMA, backend)


def latent(root: Path, backend: BackendName) -> Sample:
    """Return a tiny DeepSeek-V3: variants, stacked experts, heads' rows, and the body of an IR op in an opaque one."""
    return _configured(root, LATENT, backend)


def _configured(root: Path, config: Mapping[str, Any], backend: BackendName) -> Sample:
    model_dir = root / str(config["model_type"])
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    return language_model(root, model_dir, backend)


SAMPLES: Final[Mapping[str, Callable[[Path, BackendName], Sample]]] = {"stack": stack, "llama": llama, "latent": latent}
"""By name; a bundle that is in the directory already is opened."""

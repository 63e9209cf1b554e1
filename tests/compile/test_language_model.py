"""A small Llama compiled to native code, against transformers' own forward."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from piecework.bundle.bundle import Bundle, BundleContent, write_bundle
from piecework.bundle.run import LoadedModel, load
from piecework.compiler.model import CompiledModel
from piecework.errors import CorruptBundle, ShapeContractError, WeightsError
from piecework.foundation.notes import INTERFACE, append_note

Batch = list[tuple[Tensor, int, list[int]]]


def forward(model: LoadedModel, batch: Batch) -> Tensor:
    """Run (tokens so far, number of new ones, blocks) of each sequence, decodes first; logits of the new tokens."""
    width = max(len(blocks) for _, _, blocks in batch)
    positions = [torch.arange(len(tokens) - new, len(tokens)) for tokens, new, _ in batch]
    news = [new for _, new, _ in batch]
    (logits,) = model.run(
        {
            "input_ids": torch.cat([t[p] for (t, _, _), p in zip(batch, positions, strict=True)]),
            "positions": torch.cat(positions),
            "slot_mapping": torch.cat(
                [torch.tensor(b)[p // 16] * 16 + p % 16 for (_, _, b), p in zip(batch, positions, strict=True)]
            ),
            "block_tables": torch.tensor([b + [0] * (width - len(b)) for _, _, b in batch]),
            "seq_lens": torch.tensor([len(t) for t, _, _ in batch]),
            "query_start": torch.tensor([0, *news]).cumsum(0),
            "logits_indices": torch.arange(sum(news)),
            "num_decode_tokens": next((i for i, n in enumerate(news) if n != 1), len(news)),
        }
    )
    return logits


def expected(reference: nn.Module, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return torch.cat([reference(tokens.unsqueeze(0)).logits[0, -new:] for tokens, new, _ in batch])


def steps() -> list[Batch]:
    """Prefill, prefill beside decode, a chunk beside decode, decodes, one decode, a long prefill."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(3, 131, (n,), generator=generator) for n in (40, 40, 200))
    a_blocks, b_blocks, c_blocks = [7, 2, 5], [1, 8, 3], list(range(9, 22))
    return [
        [(a[:18], 18, a_blocks)],
        [(a[:19], 1, a_blocks), (b[:20], 20, b_blocks)],
        [(a[:20], 1, a_blocks), (b[:33], 13, b_blocks)],
        [(a[:21], 1, a_blocks), (b[:34], 1, b_blocks)],
        [(b[:35], 1, b_blocks)],
        [(c[:64], 64, c_blocks)],
        [(a[:22], 1, a_blocks), (c[:200], 136, c_blocks)],
    ]


def opened(compiled: CompiledModel, weights: object) -> LoadedModel:
    model = load(compiled.bundle, weights=weights)
    model.make_states({"blocks": 24})
    return model


def worst(model: LoadedModel, reference: nn.Module) -> float:
    found = []
    for batch in steps():
        wanted = expected(reference, batch)
        found.append(float((forward(model, batch) - wanted).abs().max() / wanted.abs().max()))
    return max(found)


def test_float32_equals_transformers(float32: CompiledModel, reference: nn.Module) -> None:
    assert worst(opened(float32, reference), reference) <= 1e-4


@pytest.mark.slow
def test_ranges_give_the_same(ranged: CompiledModel, reference: nn.Module) -> None:
    model = opened(ranged, reference)
    assert [[(r.min, r.max) for r in p.ranges] for p in model.plan.pieces] == [[(1, 1), (2, 64), (65, 256)]] * 3
    assert worst(model, reference) <= 1e-4


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_eager_bfloat16(
    bfloat16: CompiledModel, reference: nn.Module, bfloat16_reference: nn.Module
) -> None:
    model = opened(bfloat16, bfloat16_reference)
    ours = theirs = 0.0
    for batch in steps():
        wanted = expected(reference, batch)
        ours += float((forward(model, batch).float() - wanted).abs().mean())
        theirs += float((expected(bfloat16_reference, batch).float() - wanted).abs().mean())
    assert ours <= 1.5 * theirs


def test_pieces_are_compiled_once_however_many_layers(float32: CompiledModel) -> None:
    record = float32.bundle.record()
    assert record.counts["unique_pieces"] == 3
    assert record.counts["pieces"] == 4
    assert record.counts["blocks_traced"] == 1


def test_linear_weights_are_packed_and_the_rest_is_not(float32: CompiledModel, reference: nn.Module) -> None:
    model = opened(float32, reference)
    packed = {take.name for r in model.plan.recipes if r.pack for take in r.takes}
    if not packed:
        pytest.skip("nothing is packed on this CPU")
    linear = {f"{n}.weight" for n, m in reference.named_modules() if isinstance(m, nn.Linear)}
    assert packed == linear


def test_a_bundle_holds_no_weights(float32: CompiledModel, reference: nn.Module) -> None:
    names = {p.name for p in float32.bundle.path.rglob("*") if p.is_file()}
    assert {n.rpartition(".")[2] for n in names} <= {"so", "json", "safetensors"}
    model = opened(float32, reference)
    other = {n: t * 0.5 for n, t in reference.state_dict().items()}
    assert worst(model, reference) <= 1e-4
    (batch,) = steps()[:1]
    assert not torch.allclose(forward(opened(float32, other), batch), forward(model, batch), atol=1e-3)


def test_two_loads_of_one_bundle_do_not_disturb_each_other(float32: CompiledModel, reference: nn.Module) -> None:
    first = opened(float32, reference)
    second = opened(float32, {n: t * 0.5 for n, t in reference.state_dict().items()})
    (batch,) = steps()[:1]
    before = forward(first, batch)
    forward(second, batch)
    assert torch.equal(forward(first, batch), before)
    second.close()
    assert torch.equal(forward(first, batch), before)


def test_calls_outside_the_range_are_refused(float32: CompiledModel, reference: nn.Module) -> None:
    model = opened(float32, reference)
    tokens = torch.arange(257) % 131
    with pytest.raises(ShapeContractError, match="tokens = 257"):
        forward(model, [(tokens, 257, list(range(17)))])


def test_weights_of_another_model_are_refused(float32: CompiledModel, reference: nn.Module) -> None:
    state = {n: t for n, t in reference.state_dict().items() if "layers.1.mlp" not in n}
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp"):
        load(float32.bundle, weights=state)


def test_a_second_compile_finds_the_bundle(float32: CompiledModel, compiled: Callable[..., CompiledModel]) -> None:
    again = compiled()
    assert again.cached
    assert again.bundle.path == float32.bundle.path


def test_an_archive_loads_where_it_was_moved_and_needs_no_new_artifacts(
    float32: CompiledModel, compiled: Callable[..., CompiledModel], reference: nn.Module, tmp_path: Path
) -> None:
    made = compiled(out=tmp_path / "a.pwb")
    assert made.bundle.record().counts.get("compiled", 0) == 0
    moved = tmp_path / "elsewhere" / "b.pwb"
    moved.parent.mkdir()
    shutil.move(tmp_path / "a.pwb", moved)
    model = load(moved, weights=reference)
    model.make_states({"blocks": 24})
    assert worst(model, reference) <= 1e-4


def test_a_directory_loads_where_it_was_moved(float32: CompiledModel, reference: nn.Module, tmp_path: Path) -> None:
    shutil.copytree(float32.bundle.path, tmp_path / "moved")
    model = load(tmp_path / "moved", weights=reference)
    model.make_states({"blocks": 24})
    assert worst(model, reference) <= 1e-4


def test_a_changed_library_is_never_opened(float32: CompiledModel, reference: nn.Module, tmp_path: Path) -> None:
    shutil.copytree(float32.bundle.path, tmp_path / "bad")
    library = next((tmp_path / "bad").rglob("*.so"))
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.chmod(0o644)
    library.write_bytes(content)
    with pytest.raises(CorruptBundle, match=library.name[:16]):
        load(tmp_path / "bad", weights=reference)


@pytest.fixture
def no_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where attention is plain torch's."""

    def refuse(*_args: object) -> None:
        pytest.fail("plain torch was called")

    for module in ("piecework.ops.attention", "piecework.providers.cpu_attention.kernel"):
        monkeypatch.setattr(f"{module}.attend_with", refuse)


def with_another_kernel(bundle: Bundle, content: bytes, out: Path) -> Bundle:
    """Write the bundle with a file of this content in place of its attention kernel."""
    (name,) = bundle.plan()["kernels"].values()
    kernel = out.with_name(f"{hashlib.sha256(content).hexdigest()}.so")
    kernel.write_bytes(content)
    artifacts = {other: bundle.artifact_path(other) for other in bundle.artifacts if other != name}
    constants = bundle.path / "constants.safetensors"
    content = BundleContent(
        plan=json.loads(json.dumps(bundle.plan()).replace(name, kernel.name)),
        artifacts={**artifacts, kernel.name: kernel},
        facts=bundle.facts,
        record=bundle.record(),
        constants=constants.read_bytes() if constants.exists() else None,
    )
    return write_bundle(out, content)


@pytest.mark.usefixtures("no_plain_attention")
def test_a_loaded_bundle_calls_its_kernel(float32: CompiledModel, reference: nn.Module) -> None:
    model = opened(float32, reference)
    assert model.record.notes == ()
    assert worst(model, reference) <= 1e-4


def test_a_kernel_that_is_no_library_leaves_a_note_and_plain_torch(
    float32: CompiledModel, reference: nn.Module, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    claims_to_be = tmp_path / "kernel.so"
    claims_to_be.write_bytes(b"no library")
    append_note(claims_to_be, '{"kernel":"cpu_attention"}', mark=INTERFACE)
    model = load(with_another_kernel(float32.bundle, claims_to_be.read_bytes(), tmp_path / "bundle"), weights=reference)
    model.make_states({"blocks": 24})
    assert "no native kernel cpu_attention" in model.record.notes[0]
    assert worst(model, reference) <= 1e-4
    request.getfixturevalue("no_plain_attention")
    with pytest.raises(pytest.fail.Exception, match="plain torch was called"):
        worst(model, reference)


FRESH = """
import json, sys
import torch
from piecework.bundle.run import load
model = load(sys.argv[1], weights=[sys.argv[2]])
model.make_states({"blocks": 4})
one = torch.tensor([0])
logits, = model.run({"input_ids": torch.tensor([5, 6]), "positions": torch.tensor([0, 1]),
    "slot_mapping": torch.tensor([16, 17]), "block_tables": torch.tensor([[1]]), "seq_lens": torch.tensor([2]),
    "query_start": torch.tensor([0, 2]), "logits_indices": torch.tensor([1]), "num_decode_tokens": 0})
unwanted = "torch._dynamo torch._inductor sympy triton transformers".split()
print(json.dumps({"imported": [m for m in unwanted if m in sys.modules], "logits": logits[0].tolist()}))
"""


def test_a_fresh_process_imports_no_compiler(float32: CompiledModel, reference: nn.Module, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in reference.state_dict().items() if n != "lm_head.weight"}
    save_file({**state, "lm_head.weight": reference.lm_head.weight.detach().clone()}, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(float32.bundle.path), str(tmp_path / "m.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == []
    wanted = expected(reference, [(torch.tensor([5, 6]), 1, [1])])[0]
    assert (torch.tensor(found["logits"]) - wanted).abs().max() <= 1e-4 * wanted.abs().max()

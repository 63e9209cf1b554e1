"""Stamped graphs against whole traces, and which blocks of a stack share a template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from piecework.capture.capture import capture
from piecework.compiler.split import OpaqueCall, split
from piecework.models.adapter import build_causal_lm
from piecework.ops.ir.layer import LayerName
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.capture.graphs import (
    NAMED,
    Block,
    Encoder,
    Mlp,
    NamedBlock,
    Stack,
    assert_stamped_equals_traced,
    programs,
    request,
)
from tests.unit.models.tiny import write_config


@pytest.mark.parametrize(("family", "layers"), [("llama", 6), ("mistral", 3), ("qwen2", 4), ("qwen3", 5)])
def test_a_language_model_stamped_equals_it_traced(tmp_path: Path, family: str, layers: int) -> None:
    model_dir = write_config(tmp_path, family, num_hidden_layers=layers)
    wanted = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))
    assert_stamped_equals_traced(wanted, traced=1, stamped=layers - 1)


@pytest.mark.parametrize(
    ("family", "unique", "layers"),
    slow_but([(*f, n) for f in (("bamba", 6), ("qwen3_next", 8)) for n in (6, 12)], ("bamba", 6, 6)),
)
def test_a_hybrid_stamped_equals_it_traced_and_its_pieces_do_not_grow(
    tmp_path: Path, family: str, unique: int, layers: int
) -> None:
    """Two layers with states, then one that attends, and so on.

    Without experts, pieces lead from the start to a convolution; to a scan; from there to the next of a kind, or to
    attention; back from it; to the end. With experts, they lead to their first product from either kind of layer, to
    their second, and from there to either kind, or to the end.
    """
    kinds: dict[str, object] = {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * (layers // 3)
    }
    if family == "bamba":
        kinds = {"attn_layer_indices": [*range(2, layers, 3)]}
    model_dir = write_config(tmp_path, family, num_hidden_layers=layers, **kinds)
    wanted = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))
    assert_stamped_equals_traced(wanted, traced=2, stamped=layers - 2)
    assert len({p.fingerprint() for p in programs(wanted)}) == unique


def test_layer_types_that_differ_in_constants_of_attention_only_share_a_template(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    model_dir = write_config(
        tmp_path, "qwen2", num_hidden_layers=6, layer_types=kinds, use_sliding_window=True, sliding_window=12
    )
    made = assert_stamped_equals_traced(build_causal_lm(ModelSpec.of(model_dir, max_tokens=64)), traced=1, stamped=5)
    calls = [s.node for s in split(made) if isinstance(s, OpaqueCall)]
    windows = [c.args[10] if len(c.args) > 10 else 0 for c in calls]
    assert windows == [0, 12] * 3


@pytest.mark.parametrize("layers", [4, 16, 80])
def test_a_llama_has_three_unique_pieces_however_deep(tmp_path: Path, layers: int) -> None:
    made = programs(
        build_causal_lm(ModelSpec.of(write_config(tmp_path, "llama", num_hidden_layers=layers), max_tokens=64))
    )
    assert len(made) == layers + 1
    assert len({p.fingerprint() for p in made}) == 3


def test_an_encoder_stamped_equals_it_traced() -> None:
    assert_stamped_equals_traced(request(Encoder(), ("rows",), dtype="int64"), traced=1, stamped=3)


def test_a_module_without_stacks_is_traced_whole() -> None:
    assert_stamped_equals_traced(request(Mlp()), traced=0, stamped=0)


def test_a_stack_of_equal_blocks_is_traced_once() -> None:
    assert_stamped_equals_traced(request(Stack([Block() for _ in range(5)])), traced=1, stamped=4)


def test_the_module_is_left_as_it_was() -> None:
    module = Stack([Block() for _ in range(3)])
    before = dict(module.named_parameters())
    capture(request(module))
    assert all(type(b) is Block and type(b.linear) is nn.Linear for b in module.blocks)
    assert all(t is before[n] for n, t in module.named_parameters())
    assert len(before) == len(list(module.named_parameters()))


def test_the_module_is_left_as_it_was_when_capture_fails() -> None:
    class Failing(Block):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    module = Stack([Block(), Block(), Failing(), Failing()])
    before = list(module.parameters())
    with pytest.raises(Exception, match="no"):
        capture(request(module))
    assert [type(b) for b in module.blocks] == [Block, Block, Failing, Failing]
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))


def test_a_constant_that_differs_makes_a_template_of_its_own() -> None:
    blocks = [Block(scale=s) for s in (0.5, 0.25, 0.5, 0.25, 0.25)]
    made = assert_stamped_equals_traced(request(Stack(blocks)), traced=2, stamped=3)
    scales = [n.args[1] for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor"]
    assert scales == [0.5, 0.25, 0.5, 0.25, 0.25]


def test_a_shape_that_differs_makes_a_template_of_its_own() -> None:
    class Wide(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    assert_stamped_equals_traced(request(Stack([Wide(n) for n in (8, 24, 8, 24)])), traced=2, stamped=2)


def test_a_dtype_that_differs_makes_a_template_of_its_own() -> None:
    class Shift(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(8, dtype=dtype), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.by

    blocks = [Shift(d) for d in (torch.float32, torch.bfloat16, torch.float32)]
    assert_stamped_equals_traced(request(Stack(blocks)), traced=2, stamped=1)


def test_a_submodule_that_is_missing_makes_a_template_of_its_own() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8))] * 1
    blocks += [nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
    assert_stamped_equals_traced(request(Stack(blocks)), traced=2, stamped=1)


def test_a_bias_that_is_missing_makes_a_template_of_its_own() -> None:
    blocks = [nn.Linear(8, 8, bias=b) for b in (True, False, True, False)]
    assert_stamped_equals_traced(request(Stack(blocks)), traced=2, stamped=2)


def test_a_weight_tied_inside_every_block_is_stamped() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.one(x)))

    assert_stamped_equals_traced(request(Stack([Tied() for _ in range(3)])), traced=1, stamped=2)


def test_a_weight_tied_in_one_block_only_is_not_stamped_over() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.one(x)))

    blocks = [Two(), Two(), Two()]
    blocks[0].other.weight = blocks[0].one.weight
    assert_stamped_equals_traced(request(Stack(blocks)), traced=2, stamped=1)


def test_a_weight_shared_by_all_blocks_stays_one_input() -> None:
    blocks = [Block() for _ in range(4)]
    for block in blocks[1:]:
        block.linear.weight = blocks[0].linear.weight
    made = assert_stamped_equals_traced(request(Stack(blocks)), traced=1, stamped=3)
    assert sum(i.name.endswith("linear.weight") for i in made.inputs) == 1


def test_a_submodule_shared_by_all_blocks_is_stamped() -> None:
    blocks = [Block() for _ in range(4)]
    for block in blocks[1:]:
        block.norm = blocks[0].norm
    made = assert_stamped_equals_traced(request(Stack(blocks)), traced=1, stamped=3)
    assert sum("norm.weight" in i.name for i in made.inputs) == 1


def test_the_same_block_several_times_is_stamped() -> None:
    block = Block()
    made = assert_stamped_equals_traced(request(Stack([block] * 4)), traced=1, stamped=3)
    assert len([i for i in made.inputs if i.name.startswith("blocks.0")]) == 4


def test_blocks_that_count_their_calls_count_them_once() -> None:
    class Counting(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    module = Stack([Counting() for _ in range(4)])
    module.blocks[2].calls = 5
    made = capture(request(module))
    assert (made.stacks.traced, made.stacks.stamped) == (2, 2)
    assert [b.calls for b in module.blocks] == [1, 1, 6, 1]
    scales = [
        n.args[1] for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor" and not isinstance(n.args[1], float)
    ]
    assert [s for s in scales if isinstance(s, int)] == [1, 1, 6, 1]


def test_autocast_that_some_blocks_enter() -> None:
    class Casting(nn.Module):
        def __init__(self, *, casts: bool) -> None:
            super().__init__()
            self.linear, self.casts = nn.Linear(8, 8), casts

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.casts):
                return self.linear(x).float()

    assert_stamped_equals_traced(
        request(Stack([Casting(casts=c) for c in (False, True, False, True)])), traced=2, stamped=2
    )


def test_a_tensor_that_one_block_keeps_for_another() -> None:
    """The block that keeps it does what its siblings do otherwise; so the capture begins again without templates."""

    class Keeping(nn.Module):
        def __init__(self, box: dict[str, Tensor], *, keeps: bool, takes: bool) -> None:
            super().__init__()
            self.linear, self.box, self.keeps, self.takes = nn.Linear(8, 8), box, keeps, takes

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if self.keeps:
                self.box["kept"] = y
            return y + 1 + (self.box["kept"] if self.takes else 0)

    box: dict[str, Tensor] = {}
    module = Stack([Keeping(box, keeps=i == 1, takes=i == 3) for i in range(4)])
    made = assert_stamped_equals_traced(request(module), traced=0, stamped=0)
    assert "keep a tensor" in made.stacks.notes[0]


def test_blocks_that_hand_values_on_behind_the_arguments_are_traced_by_themselves() -> None:
    class Shared(nn.Module):
        def __init__(self, box: list[Tensor]) -> None:
            super().__init__()
            self.box = box
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x) + (self.box[-1] if self.box else 0)
            self.box.append(y)
            return y

    box: list[Tensor] = []
    module = Stack([Shared(box) for _ in range(4)])
    made = capture(request(module))
    assert "keeps a tensor" in made.stacks.notes[0]
    box.clear()
    whole = capture(request(module), templates=False)
    adds = [len([n for n in g.graph.nodes if "add" in str(n.target)]) for g in (made, whole)]
    assert adds[0] == adds[1]
    box.clear()


def test_a_block_with_a_hook_is_traced_by_itself() -> None:
    module = Stack([Block() for _ in range(4)])
    module.blocks[2].linear.register_forward_hook(lambda part, args, out: out * 3.0)
    made = assert_stamped_equals_traced(request(module), traced=2, stamped=2)
    assert [n.args[1] for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor"].count(3.0) == 1


def test_a_forward_that_one_instance_overrides_is_seen() -> None:
    module = Stack([Block() for _ in range(4)])
    module.blocks[1].linear.forward = lambda x: x * 7.0
    made = assert_stamped_equals_traced(request(module), traced=2, stamped=2)
    assert [n.args[1] for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor"].count(7.0) == 1


def test_nested_stacks_are_stamped_at_both_levels() -> None:
    module = Stack([Stack([Block() for _ in range(3)]) for _ in range(2)])
    assert_stamped_equals_traced(request(module), traced=2, stamped=3)


def test_nested_stacks_whose_insides_differ() -> None:
    module = Stack([Stack([Block(scale=s) for s in (1.0, 2.0)]), Stack([Block(scale=s) for s in (1.0, 3.0)])])
    made = capture(request(module))
    assert [n.args[1] for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor"] == [1.0, 2.0, 1.0, 3.0]


def test_no_layer_name_is_in_a_program() -> None:
    module = Stack([NamedBlock(LayerName(f"secret.{i}")) for i in range(4)])
    made = programs(request(module, opaque=NAMED))
    assert len({p.fingerprint() for p in made}) == 1
    text = str([p.to_json() for p in made])
    assert "secret" not in text
    assert "blocks" not in text


def test_torchs_own_encoder_layers_are_stamped() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    module = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    assert_stamped_equals_traced(request(module, (2, "rows", 16)), traced=1, stamped=2)

"""Dynamo's graphs whose arguments have sums of other arguments' sizes, or that call torch.functional."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from piecework.bundle.record import Recorder
from piecework.integrations.torch_compile import backend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Joined(nn.Module):
    """Texts and image attended to together, with positions for both, as in Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, texts: Tensor, image: Tensor, places: Tensor) -> Tensor:
        return self.linear(torch.cat([texts, image])) * places


def test_a_size_that_is_a_sum() -> None:
    module, recorder = Joined(), Recorder()
    run = torch.compile(module, backend=backend, dynamic=True, options={"recorder": recorder, "backend": "eager"})
    for texts, image in ((3, 5), (7, 2), (16, 40)):
        given = torch.randn(texts, 8), torch.randn(image, 8), torch.randn(texts + image, 8)
        torch.testing.assert_close(run(*given), module(*given))
    assert recorder.finish().notes == ()


def test_einsum_is_no_transform() -> None:
    recorder = Recorder()
    run = torch.compile(
        lambda x: torch.einsum("nhwc->nchw", x) * 2, backend=backend, options={"recorder": recorder, "backend": "eager"}
    )
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(run(x), x.permute(0, 3, 1, 2) * 2)
    assert recorder.finish().notes == ()

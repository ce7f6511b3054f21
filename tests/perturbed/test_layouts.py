"""Where examples are in a tensor."""

import pytest
import torch

from zo_lightning.perturbed.layouts import FIRST, Layout, layouts_of

B = 3


@pytest.mark.parametrize("layout", [FIRST, Layout(1), Layout(2), Layout(0, True), Layout(1, False), Layout(1, True)])
@pytest.mark.parametrize("times", [1, 4])
def test_rows_are_of_examples_and_restore_is_the_inverse(layout: Layout, times: int) -> None:
    shape = [5, 7, 2]
    shape[layout.axis] = B * times
    # Every number is the example that it belongs to.
    of = torch.arange(B).repeat(times) if layout.inner else torch.arange(B).repeat_interleave(times)
    owner = of.view(*[-1 if axis == layout.axis else 1 for axis in range(3)]).expand(shape)
    assert torch.equal(layout.rows(owner, B), torch.arange(B).view(-1, 1).expand(B, owner.numel() // B))
    tensor = torch.randn(shape)
    assert torch.equal(layout.restore(layout.rows(tensor, B), shape), tensor)
    assert layout.fits(shape, B) and not layout.fits(shape, 11)


def test_layouts_of_a_shape() -> None:
    assert list(layouts_of((6, 3, 4), 3)) == [Layout(1), FIRST, Layout(0, True)]
    assert not list(layouts_of((4, 5), 3))

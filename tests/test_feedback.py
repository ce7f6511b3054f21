import math

import pytest
import torch
from torch import Tensor

from zo_lightning.feedback import Feedback, Shrinkage

B, C = 16, 3


def test_learns_the_jacobian_that_explains_the_responses() -> None:
    torch.manual_seed(0)
    jacobians = {"a": torch.randn(12, C), "b": torch.randn(2, C)}
    feedback = Feedback()
    for _ in range(200):
        moved = {"a": torch.randn(B, 3, 4).sign(), "b": torch.randn(B, 2).sign()}
        response = sum((x.flatten(1) @ jacobians[key] for key, x in moved.items()), torch.zeros(B, C))
        feedback.learn(moved, response, rate=0.5)
    error = torch.randn(B, C)
    for key, like in (("a", torch.zeros(B, 3, 4)), ("b", torch.zeros(B, 2))):
        h = feedback.predict(key, error, like, None)
        assert h is not None and h.shape == like.shape
        assert torch.allclose(h.flatten(1), error @ jacobians[key].T, atol=1e-3)


@pytest.mark.parametrize("width", [4, 100])
def test_is_stable_for_rates_below_two_whatever_the_displacements(width: int) -> None:
    """All examples are displaced alike: the steps of least mean squares would add up and explode."""
    torch.manual_seed(0)
    feedback, x = Feedback(), torch.ones(B, width)
    for _ in range(100):
        feedback.learn({"a": x}, torch.ones(B, C), rate=1.9)
    h = feedback.predict("a", torch.ones(1, C), torch.zeros(1, width), None)
    assert h is not None and h.sum().item() == pytest.approx(C, rel=1e-4)  # every logit is explained


def test_predicts_nothing_before_it_has_learned_or_for_another_size() -> None:
    feedback, error = Feedback(), torch.ones(B, C)
    assert feedback.predict("a", error, torch.zeros(B, 4), None) is None
    feedback.learn({"a": torch.ones(B, 4)}, torch.ones(B, C), 0.5)
    assert feedback.predict("a", error, torch.zeros(B, 5), None) is None
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(B, 4)
    h = feedback.predict("a", error, torch.zeros(B, 4), mask)
    assert h is not None and torch.equal(h != 0, mask > 0)


def test_no_displacement_teaches_nothing() -> None:
    feedback = Feedback()
    feedback.learn({"a": torch.zeros(B, 4)}, torch.zeros(B, C), 0.5)
    assert torch.equal(feedback.maps["a"], torch.zeros(4, C))


def corrections(bias: float, noise: float, steps: int, n: int = 1000) -> Shrinkage:
    generator = torch.Generator().manual_seed(0)

    def half() -> list[Tensor]:
        return [bias / math.sqrt(n) + noise * math.sqrt(2 / n) * torch.randn(n, generator=generator)]

    shrinkage = Shrinkage()
    for _ in range(steps):
        shrinkage.measure("a", half(), half())
    return shrinkage


def test_shrinkage_weighs_bias_against_noise() -> None:
    """b = 1 and V = 4, τ = 10: λ = 1 / 1.4, less what two standard errors of b² cost.

    <c₁, c₂> of n = 1,000 numbers has standard deviation 8/√1000 + 2·√8/√1000 at most, 0.43, and the mean of 39 of them
    0.07: b² is taken as 0.86 ± 0.14 of the chance deviation, λ between 0.6 and 0.75.
    """
    assert 0.6 < corrections(1.0, 2.0, 500).weight("a") < 0.75


def test_shrinkage_does_not_take_noise_for_bias() -> None:
    shrinkage = corrections(0.0, 2.0, 500)
    # b² is 0 ± 0.05, of which two standard errors are taken off: more than 0.06 remains once in a thousand times.
    assert shrinkage.weight("a") < 0.06 / (0.06 + 4 / 10)
    assert corrections(1.0, 2.0, 1).weight("a") == 0.0, "one measurement says nothing of its own error"


def test_shrinkage_trusts_the_mean_of_several_samples_more() -> None:
    shrinkage = corrections(1.0, 2.0, 100)
    assert shrinkage.weight("a") < shrinkage.weight("a", samples=4) < 1


def test_states_come_back() -> None:
    shrinkage, again = corrections(1.0, 2.0, 10), Shrinkage()
    again.load_state_dict(shrinkage.state_dict())
    assert again.weight("a") == shrinkage.weight("a")
    feedback, copy = Feedback(), Feedback()
    feedback.learn({"a": torch.ones(B, 4)}, torch.ones(B, C), 0.5)
    copy.load_state_dict(feedback.state_dict())
    assert torch.equal(copy.maps["a"], feedback.maps["a"])

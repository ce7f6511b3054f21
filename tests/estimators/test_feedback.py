import copy
import math

import pytest
import torch

from zo_lightning.estimators.per_example.feedback import MANY, Feedback, Shrinkage

B, C = 16, 3


def test_learns_the_jacobian_that_explains_the_responses() -> None:
    torch.manual_seed(0)
    jacobians = {"a": torch.randn(12, C), "b": torch.randn(2, C)}
    feedback = Feedback()
    for _ in range(200):
        moved = {"a": torch.randn(B, 12).sign(), "b": torch.randn(B, 2).sign()}
        response = sum((x @ jacobians[key] for key, x in moved.items()), torch.zeros(B, C))
        feedback.learn(moved, response, torch.zeros(B, C), rate=0.5)
    error = torch.randn(B, C)
    for key, like in (("a", torch.zeros(B, 12)), ("b", torch.zeros(B, 2))):
        h = feedback.predict(key, error, like, None)
        assert h is not None and h.shape == like.shape
        assert torch.allclose(h, error @ jacobians[key].T, atol=1e-3)


def test_of_many_outputs_those_with_the_largest_errors_are_used_and_taught() -> None:
    torch.manual_seed(0)
    feedback, classes = Feedback(), 2 * MANY
    jacobian = torch.randn(12, classes)
    for _ in range(3000):
        moved, error = torch.randn(B, 12).sign(), torch.zeros(B, classes)
        error.scatter_(1, torch.randint(classes, (B, 1)), -1.0)  # a confident softmax: one class is wrong
        feedback.learn({"a": moved}, moved @ jacobian, error, rate=0.5)
    error = torch.zeros(B, classes).scatter_(1, torch.randint(classes, (B, 32)), 1.0)
    h = feedback.predict("a", error, torch.zeros(B, 12), None, feedback.used(error))
    assert h is not None and torch.allclose(h, error @ jacobian.T, atol=1e-3)
    assert feedback.used(torch.zeros(B, MANY - 1)) is None


@pytest.mark.parametrize("width", [4, 100])
def test_is_stable_for_rates_below_two_whatever_the_displacements(width: int) -> None:
    """All examples are displaced alike: the steps of least mean squares would add up and explode."""
    torch.manual_seed(0)
    feedback, x = Feedback(), torch.ones(B, width)
    for _ in range(100):
        feedback.learn({"a": x}, torch.ones(B, C), torch.ones(B, C), rate=1.9)
    h = feedback.predict("a", torch.ones(1, C), torch.zeros(1, width), None)
    assert h is not None and h.sum().item() == pytest.approx(C, rel=1e-4)  # every logit is explained


def test_predicts_nothing_before_it_has_learned_or_for_another_size() -> None:
    feedback, error = Feedback(), torch.ones(B, C)
    assert feedback.predict("a", error, torch.zeros(B, 4), None) is None
    feedback.learn({"a": torch.ones(B, 4)}, torch.ones(B, C), torch.ones(B, C), 0.5)
    assert feedback.predict("a", error, torch.zeros(B, 5), None) is None
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(B, 4)
    h = feedback.predict("a", error, torch.zeros(B, 4), mask)
    assert h is not None and torch.equal(h != 0, mask > 0)


def test_no_displacement_teaches_nothing() -> None:
    feedback = Feedback()
    feedback.learn({"a": torch.zeros(B, 4)}, torch.zeros(B, C), torch.zeros(B, C), 0.5)
    assert torch.equal(feedback.maps["a"], torch.zeros(C, 4))


def trust(bias: float, noise: float, steps: int, n: int = 1000) -> float:
    """λ after corrections of n numbers with ‖mean‖ = bias and variance noise²."""
    generator = torch.Generator().manual_seed(0)
    shrinkage, value = Shrinkage(), -1.0
    for _ in range(steps):
        c = bias / math.sqrt(n) + noise / math.sqrt(n) * torch.randn(n, generator=generator)
        value = shrinkage.measure("a", [c[:100], c[100:]])
    return value


def test_shrinkage_weighs_bias_against_noise() -> None:
    """With b = 1 and V = 4, λ = 1 / (1 + 4) = 0.2, less two standard errors.

    With c̄ the mean of some (2 − 0.3) / 0.3 = 6 steps, <c, c̄> has standard deviation 0.09, √((4 + 20/6) / 1000);
    in the mean of some (2 − 0.05) / 0.05 = 39 steps, which overlap, 0.014 to 0.03: λ is off by up to 4 of them, over 5.
    """
    assert trust(1.0, 2.0, 600) == pytest.approx(0.2, abs=0.025)


def test_shrinkage_does_not_take_noise_for_bias() -> None:
    # <c, c̄> has standard deviation 4/√(6 · 1000) = 0.05, and 0.01 in the mean, of which two are taken away: with 4 such
    # standard deviations left λ would be 0.02 / 4.
    assert trust(0.0, 2.0, 600) <= 0.005
    assert trust(1.0, 0.0, Shrinkage.LEAST) == 0.0, "the scatter of few steps says nothing"


def test_shrinkage_begins_anew_for_a_layer_of_another_size() -> None:
    shrinkage = Shrinkage()
    for _ in range(2):
        shrinkage.measure("a", [torch.ones(4)])
    assert shrinkage.measure("a", [torch.ones(3), torch.ones(2)]) == 0.0
    assert shrinkage.moments["a"][0] == 1


def test_states_come_back() -> None:
    shrinkage, again = Shrinkage(), Shrinkage()
    for _ in range(Shrinkage.LEAST):
        shrinkage.measure("a", [torch.ones(4)])
    again.load_state_dict(copy.deepcopy(shrinkage.state_dict()))
    assert shrinkage.measure("a", [torch.ones(4)]) == again.measure("a", [torch.ones(4)]) == 1.0
    feedback, restored = Feedback(), Feedback()
    feedback.learn({"a": torch.ones(B, 4)}, torch.ones(B, C), torch.ones(B, C), 0.5)
    restored.load_state_dict(feedback.state_dict())
    assert torch.equal(restored.maps["a"], feedback.maps["a"])

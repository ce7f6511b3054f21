"""A suggestion becomes the options of the configuration that it was found for."""

import pytest

from zo_lightning.tuning.overlay import as_yaml, overlay
from zo_lightning.tuning.suggestion import Suggestion

SUGGESTION = Suggestion(
    mu=1e-3,
    lr=0.0204,
    factor=2.04,
    estimator=None,
    scan=None,
    trials=(),
    start=1.0,
    batches_in_run=None,
    warnings=(),
    forward_passes=0,
)
STENCIL = {"class_path": "CentralDifference", "init_args": {"mu": 0.5}}
ESTIMATOR = {"class_path": "ZerothOrder", "init_args": {"stencil": STENCIL, "samples": 4}}
OPTIMIZER = {"class_path": "SGD", "init_args": {"lr": 1e-2, "momentum": 0.9}}
NEW = {
    "class_path": "ZerothOrder",
    "init_args": {"stencil": {"class_path": "CentralDifference", "init_args": {"mu": 1e-3}}},
}
FASTER = {"class_path": "SGD", "init_args": {"lr": 0.02}}


def test_classifier() -> None:
    config = {"model": {"estimator": ESTIMATOR, "optimizer": OPTIMIZER, "lr_scheduler": None}, "trainer": {}}
    assert overlay(SUGGESTION, config) == ({"model": {"estimator": NEW, "optimizer": FASTER}}, [])


def test_module_as_it_is_with_optimizer_and_estimator_beside_it() -> None:
    config = {"model": {"class_path": "Lit", "init_args": {}}, "estimator": ESTIMATOR, "optimizer": OPTIMIZER}
    assert overlay(SUGGESTION, config) == ({"estimator": NEW, "optimizer": FASTER}, [])


def test_module_with_a_learning_rate_and_no_estimator_named() -> None:
    config = {"model": {"class_path": "Lit", "init_args": {"lr": 1e-2, "width": 3}}, "estimator": None}
    model = {"class_path": "Lit", "init_args": {"lr": 0.02}}
    assert overlay(SUGGESTION, config) == ({"estimator": NEW, "model": model}, [])


def test_module_with_an_estimator_among_its_options() -> None:
    config = {"model": {"class_path": "Lit", "init_args": {"estimator": ESTIMATOR, "optimizer": OPTIMIZER}}}
    model = {"class_path": "Lit", "init_args": {"estimator": NEW, "optimizer": FASTER}}
    assert overlay(SUGGESTION, config) == ({"model": model}, [])


def test_schedule_that_rises_has_the_learning_rate() -> None:
    cycle = {"class_path": "OneCycleLR", "init_args": {"max_lr": 1e-2, "total_steps": 9}}
    config = {"model": {"estimator": ESTIMATOR, "optimizer": OPTIMIZER, "lr_scheduler": cycle}}
    changed, _ = overlay(SUGGESTION, config)
    assert changed["model"]["lr_scheduler"] == {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.02}}
    assert "optimizer" not in changed["model"]


@pytest.mark.parametrize("callbacks", [[{"class_path": "zo_lightning.GradientFree"}], {"class_path": "GradientFree"}])
def test_what_no_option_holds_is_said(callbacks: object) -> None:
    config = {
        "model": {"class_path": "Lit", "init_args": {}},
        "estimator": None,
        "optimizer": None,
        "trainer": {"callbacks": callbacks},
    }
    changed, by_hand = overlay(SUGGESTION, config)
    assert changed == {}
    assert by_hand[0] == "mu is 0.001: set it where the estimator is made"
    assert by_hand[1].startswith("the learning rate is 0.02, 2.04 times what configure_optimizers gives")


def test_file_has_its_story_as_a_comment() -> None:
    assert as_yaml({"optimizer": FASTER}, "One.\nTwo.").startswith("# One.\n# Two.\noptimizer:\n  class_path: SGD\n")

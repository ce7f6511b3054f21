"""Hardware in the loop, in simulation: weights are trained on the chip that will use them."""

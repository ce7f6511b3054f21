"""A study: a grid of methods, nets and seeds, run, measured, drawn and reported."""

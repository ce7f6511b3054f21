"""A study: a grid of methods, tasks, budgets and seeds, run, measured, drawn and reported."""

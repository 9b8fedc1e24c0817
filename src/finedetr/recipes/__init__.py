"""One file a paper: a function from a recipe to a recipe."""

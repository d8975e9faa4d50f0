"""One folder a model; models never import one another."""

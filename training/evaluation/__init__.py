"""A fitted model: bounds on log p(x), how tight they are, the best constant, and what the latents carry."""

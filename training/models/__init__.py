"""Latent variable models, one file a family, of a prior p(z), a likelihood p(x|z) and a posterior q(z|x)."""

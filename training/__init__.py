"""Training of latent variable models and their export to bundles. The only part of vaeserve that imports torch."""

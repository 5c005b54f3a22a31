"""Formats convert bytes to arrays and back: images, npy, JSON, tables and multipart forms in, pictures and npy out."""

"""Bytes to arrays and back: images, npy, JSON, tables, multipart forms, pictures."""

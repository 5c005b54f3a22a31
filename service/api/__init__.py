"""The HTTP API: the app, its middleware, its routes and its schemas."""

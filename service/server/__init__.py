"""The processes that serve the app: limits of connections, the drain window, workers."""

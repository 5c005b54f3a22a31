"""The processes that serve the app: workers under gunicorn, their address, limits of connections, the drain window."""

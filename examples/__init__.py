"""Programs over attngen: demo.py, and serve, a server. Not installed with it."""

"""WASI 0.2 in Python, for components that the engine's own host cannot serve: those that use the network."""

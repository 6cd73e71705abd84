"""The scheduler over HTTP. These modules need the extra "serve"."""

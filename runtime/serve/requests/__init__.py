"""The bodies of requests: what they may hold, what it means, and their description."""

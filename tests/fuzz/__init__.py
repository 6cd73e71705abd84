"""Files, requests and calls that nobody in his right mind would send, drawn at random: see ``oracles``."""

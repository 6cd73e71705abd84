"""A dense checkpoint becomes a routed one: calibration of untrained keys, training of gates, adapters."""

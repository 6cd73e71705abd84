"""Many jobs on one device: rows join and leave a running batch."""

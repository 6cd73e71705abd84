"""What a check found, to read: in the terminal, as JSON, as one page."""

"""Speed and memory against context length, beside a dense twin."""

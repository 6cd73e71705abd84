"""What the families share: what a family declares, keys, positions, windows, expert gates, and which tensor fills which.

family.py    Family and Layout, and checked access to a file's values
keys.py      which keys matter, which do not, which are refused
rope.py windows.py gates.py   positions, sliding windows and expert gates as config.json describes them
pieces.py    a layout and the stored names -> which rows fill which of the model's tensors
"""

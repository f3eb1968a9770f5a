"""The small PLM that ships with the package; launch/make_embedded.py made it."""

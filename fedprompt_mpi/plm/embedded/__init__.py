"""The small PLM that ships with the package, and how it was made."""

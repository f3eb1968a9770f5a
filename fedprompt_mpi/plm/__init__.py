"""The frozen PLM and what steers it."""

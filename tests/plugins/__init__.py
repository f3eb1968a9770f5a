"""Plug-ins: how they are loaded, and what must hold of them."""

"""Audit: figures and records of what an upload, a broadcast or a prompt betrays of its data; no model."""

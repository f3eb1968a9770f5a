"""Forecast: what a federation would cost on another network, with more clients; no model, no MPI."""

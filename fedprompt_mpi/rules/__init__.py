"""Aggregators, attacks on an update, server optimisers, each with its options. They need neither a model nor MPI."""

"""The steps of Algorithm 1: cohorts, local training, updates, the server, evaluation."""

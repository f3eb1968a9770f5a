"""How vectors travel between ranks, and what that costs; knows neither prompts nor PLMs."""

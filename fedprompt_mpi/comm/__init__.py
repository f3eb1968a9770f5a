"""Transport between ranks and its measurement. Nothing here knows what a prompt or a loss is."""

"""Doors into the tools that train and serve LoRAs, each tool imported by its own file alone."""
